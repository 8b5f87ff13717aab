package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/scheme"
	typed "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
)

// thrifty is a client whose lists of pods are read one pod at a time, of which only
// what is kept stays in memory. A thousand injected pods are 13 MB on the wire, and
// 90 MB while they are decoded at once; one by one they are 5 MB. A list comes as
// JSON, for its items can be told apart while it arrives.
type thrifty struct{ typed.CoreV1Interface }

func (c thrifty) Pods(namespace string) typed.PodInterface {
	return thriftyPods{c.CoreV1Interface.Pods(namespace), c.RESTClient(), namespace}
}

type thriftyPods struct {
	typed.PodInterface
	client    rest.Interface
	namespace string
}

// List lists pods, trimmed.
func (p thriftyPods) List(ctx context.Context, o metav1.ListOptions) (*corev1.PodList, error) {
	body, err := p.client.Get().Namespace(p.namespace).Resource("pods").VersionedParams(&o, scheme.ParameterCodec).
		SetHeader("Accept", "application/json").Stream(ctx)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	out := &corev1.PodList{}
	out.ListMeta, err = readList(body, func(p *corev1.Pod) { out.Items = append(out.Items, *trimPod(p)) })
	if err != nil {
		return nil, fmt.Errorf("read the list of pods: %w", err)
	}
	return out, nil
}

// readList reads a list of API objects, and hands over each.
func readList[T any](body io.Reader, take func(*T)) (meta metav1.ListMeta, err error) {
	in := json.NewDecoder(body)
	if err := expect(in, '{'); err != nil {
		return meta, err
	}
	for in.More() {
		key, err := in.Token()
		if err != nil {
			return meta, err
		}
		switch key {
		case "metadata":
			err = in.Decode(&meta)
		case "items":
			err = readItems(in, take)
		default:
			var other json.RawMessage
			err = in.Decode(&other)
		}
		if err != nil {
			return meta, err
		}
	}
	if err := expect(in, '}'); err != nil {
		return meta, err // cut off
	}
	if meta.ResourceVersion == "" {
		return meta, errors.New("it has no resourceVersion to watch from")
	}
	return meta, nil
}

func readItems[T any](in *json.Decoder, take func(*T)) error {
	first, err := in.Token()
	if err != nil || first == nil { // null: none
		return err
	}
	if first != json.Delim('[') {
		return fmt.Errorf("its items begin with %v", first)
	}
	for in.More() {
		object := new(T)
		if err := in.Decode(object); err != nil {
			return err
		}
		take(object)
	}
	return expect(in, ']')
}

func expect(in *json.Decoder, want json.Delim) error {
	got, err := in.Token()
	if err == nil && got != want {
		err = fmt.Errorf("it has %v where %v belongs", got, want)
	}
	return err
}
