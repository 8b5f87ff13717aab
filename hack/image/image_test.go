// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"bytes"
	"crypto/x509"
	"debug/elf"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	cdx "github.com/CycloneDX/cyclonedx-go"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

func example(t *testing.T) options {
	t.Helper()
	return options{
		Source: "../..", Out: filepath.Join(t.TempDir(), "image"), Name: "localhost/sluice", Version: "1.2.3-test", Revision: "abc",
		Created: time.Unix(1_700_000_000, 0).UTC(), Platforms: []string{"amd64"},
	}
}

func mustBuild(t *testing.T, o options) (result, []byte) {
	t.Helper()
	r, err := build(o)
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(r.Tarball)
	if err != nil {
		t.Fatal(err)
	}
	return r, data
}

func TestTheSameSourceGivesTheSameBytesAndAnImageThatHoldsWhatItShould(t *testing.T) {
	first := example(t)
	r, data := mustBuild(t, first)
	t.Setenv("TZ", "Asia/Tokyo")
	if _, again := mustBuild(t, example(t)); !bytes.Equal(data, again) {
		t.Error("two builds differ")
	}
	later := example(t)
	later.Created = later.Created.Add(time.Second)
	if _, other := mustBuild(t, later); bytes.Equal(data, other) {
		t.Error("a build of another time is the same: the comparison sees nothing")
	}
	image := onlyImage(t, r)
	checkConfig(t, image)
	files := filesOf(t, image)
	checkPrograms(t, files)
	checkCertificates(t, files["etc/ssl/certs/ca-certificates.crt"])
	checkSBOM(t, files["usr/share/sluice/sbom.cdx.json"])
}

// onlyImage reads the image back from the layout, every digest checked.
func onlyImage(t *testing.T, r result) v1.Image {
	t.Helper()
	top, err := layout.ImageIndexFromPath(r.Layout)
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Index(top); err != nil {
		t.Fatal(err)
	}
	manifest, err := top.IndexManifest()
	if err != nil || len(manifest.Manifests) != 1 {
		t.Fatal("the layout: ", manifest, err)
	}
	named := manifest.Manifests[0]
	if named.Annotations["io.containerd.image.name"] != "localhost/sluice:1.2.3-test" || named.Digest.String() != r.Digest {
		t.Error("the layout names ", named)
	}
	index, err := top.ImageIndex(named.Digest)
	if err != nil {
		t.Fatal(err)
	}
	platforms, err := index.IndexManifest()
	if err != nil || len(platforms.Manifests) != 1 || platforms.Manifests[0].Platform.String() != "linux/amd64" {
		t.Fatal("the image's platforms: ", platforms, err)
	}
	image, err := index.Image(platforms.Manifests[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	return image
}

func checkConfig(t *testing.T, image v1.Image) {
	t.Helper()
	config, err := image.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(config.Config.Entrypoint, []string{"/usr/local/bin/sluiced"}) || config.Architecture != "amd64" {
		t.Error("the configuration is ", config)
	}
	for label, want := range map[string]string{"version": "1.2.3-test", "revision": "abc", "created": "2023-11-14T22:13:20Z"} {
		if got := config.Config.Labels["org.opencontainers.image."+label]; got != want {
			t.Errorf("label %s is %q, want %q", label, got, want)
		}
	}
}

func filesOf(t *testing.T, image v1.Image) map[string][]byte {
	t.Helper()
	stream := mutate.Extract(image)
	defer stream.Close()
	out := map[string][]byte{}
	for reader := tar.NewReader(stream); ; {
		h, err := reader.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Uid != 0 || h.Gid != 0 || h.Mode&0o022 != 0 {
			t.Errorf("%s belongs to %d:%d with mode %o", h.Name, h.Uid, h.Gid, h.Mode)
		}
		if h.Typeflag == tar.TypeReg {
			if out[h.Name], err = io.ReadAll(reader); err != nil {
				t.Fatal(err)
			}
			if strings.HasPrefix(h.Name, "usr/local/bin/") && h.Mode != 0o755 {
				t.Errorf("%s has mode %o", h.Name, h.Mode)
			}
		}
	}
}

func checkPrograms(t *testing.T, files map[string][]byte) {
	t.Helper()
	if len(files) != len(programs)+3 || files["LICENSE"] == nil {
		t.Errorf("the image has %d files", len(files))
	}
	for _, p := range programs {
		if !bytes.Contains(files["usr/local/bin/"+p], []byte("1.2.3-test")) {
			t.Errorf("%s does not know its version", p)
		}
		program, err := elf.NewFile(bytes.NewReader(files["usr/local/bin/"+p]))
		if err != nil {
			t.Fatalf("%s: %v", p, err)
		}
		for _, part := range program.Progs {
			if part.Type == elf.PT_INTERP {
				t.Errorf("%s is not static", p)
			}
		}
	}
}

func checkCertificates(t *testing.T, bundle []byte) {
	t.Helper()
	if pool := x509.NewCertPool(); !pool.AppendCertsFromPEM(bundle) || bytes.Count(bundle, []byte("BEGIN CERTIFICATE")) < 50 {
		t.Errorf("the bundle has %d certificates", bytes.Count(bundle, []byte("BEGIN CERTIFICATE")))
	}
}

func checkSBOM(t *testing.T, text []byte) {
	t.Helper()
	var bom cdx.BOM
	if err := cdx.NewBOMDecoder(bytes.NewReader(text), cdx.BOMFileFormatJSON).Decode(&bom); err != nil || !json.Valid(text) {
		t.Fatal("the SBOM: ", err)
	}
	want, err := os.ReadFile("../../go.mod")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"github.com/cilium/ebpf", "k8s.io/client-go", "github.com/containernetworking/cni"} {
		i := slices.IndexFunc(*bom.Components, func(c cdx.Component) bool { return c.Name == name })
		if i < 0 {
			t.Errorf("the SBOM lacks %s", name)
			continue
		}
		if line := "\t" + name + " " + (*bom.Components)[i].Version + "\n"; !strings.Contains(string(want), line) {
			t.Errorf("go.mod has no line %q", line)
		}
	}
	if dependencies := *bom.Dependencies; len(dependencies) != len(programs)+1 || len(*dependencies[0].Dependencies) < 10 {
		t.Error("the SBOM says too little of what is linked into what")
	}
}

func TestBadOptionsAreRefusedWithASentence(t *testing.T) {
	for want, args := range map[string][]string{
		"cannot be an image's tag":          {"--version", "a b", "--created", "0"},
		"no BPF objects for \"riscv64\"":    {"--version", "1", "--created", "0", "--platforms", "amd64,riscv64"},
		"is no number of seconds since 197": {"--version", "1", "--created", "yesterday"},
	} {
		if err := run(args); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v, want %q", args, err, want)
		}
	}
}
