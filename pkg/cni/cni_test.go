package cni

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
)

// args are a call's, with files that are the test's own and no daemon.
func args(t *testing.T) (a *skel.CmdArgs, log string) {
	dir := t.TempDir()
	log = filepath.Join(dir, "log")
	text := `{"cniVersion":"1.0.0","name":"net","type":"sluice-cni","socket":"` + dir + `/s","stateFile":"` + dir + `/state","bpffs":"` + dir + `/bpf","logFile":"` + log + `"}`
	return &skel.CmdArgs{ContainerID: "c1", IfName: "eth0", StdinData: []byte(text)}, log
}

func codeOf(err error) uint {
	var e *types.Error
	if errors.As(err, &e) {
		return e.Code
	}
	return 0
}

func TestAPanicIsAnErrorOfTheSpecificationWhereAVerbMayFail(t *testing.T) {
	for _, mayFail := range []bool{true, false} {
		a, log := args(t)
		err := verb{"TRY", time.Minute, mayFail, func(context.Context, *call) error { panic("one bad pod") }}.call(a)
		if mayFail && (codeOf(err) != codePanic || !strings.Contains(err.Error(), "one bad pod")) || !mayFail && err != nil {
			t.Errorf("may fail: %v: the error is %v", mayFail, err)
		}
		text, err := os.ReadFile(log)
		if err != nil || !strings.Contains(string(text), "goroutine") {
			t.Errorf("the log has no stack: %v, %s", err, text)
		}
	}
}

func TestAVerbThatHangsIsLeftWhenItsTimeIsOver(t *testing.T) {
	for _, mayFail := range []bool{true, false} {
		a, _ := args(t)
		hang := make(chan struct{})
		err := verb{"TRY", 50 * time.Millisecond, mayFail, func(context.Context, *call) error { <-hang; return nil }}.call(a)
		close(hang)
		if mayFail && codeOf(err) != types.ErrTryAgainLater || !mayFail && err != nil {
			t.Errorf("may fail: %v: the error is %v", mayFail, err)
		}
	}
}

func FuzzParseConfig(f *testing.F) {
	f.Add([]byte(`{"cniVersion":"1.0.0","name":"net","type":"sluice-cni","socket":"/s","ownPod":{"namespace":"n","prefix":"p"},"runtimeConfig":{"io.kubernetes.cri.pod-annotations":{"a":"b"}}}`))
	f.Add([]byte(`{"cniVersion":"0.2.0","prevResult":{"ip4":{"ip":"10.0.0.1/24"}}}`))
	f.Add([]byte(`{"cniVersion":"1.1.0","prevResult":{"ips":[{"address":"10.0.0.1/24","interface":7}]},"cni.dev/valid-attachments":[{"containerID":"c","ifname":"e"}]}`))
	f.Add([]byte(`[]`))
	f.Fuzz(func(t *testing.T, stdin []byte) {
		c, err := parseConfig(stdin)
		if err == nil {
			err = c.parsePrevResult()
			c.annotations()
		}
		if err != nil && codeOf(err) != types.ErrDecodingFailure {
			t.Errorf("%q: the error is %v", stdin, err)
		}
	})
}

func FuzzParseArgs(f *testing.F) {
	f.Add("IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart;K8S_POD_UID=u")
	f.Add("K8S_POD_NAMESPACE=a=b;;")
	f.Add("IgnoreUnknown=maybe")
	f.Fuzz(func(t *testing.T, text string) {
		if _, err := parseArgs(text); err != nil && codeOf(err) != types.ErrInvalidEnvironmentVariables {
			t.Errorf("%q: the error is %v", text, err)
		}
	})
}
