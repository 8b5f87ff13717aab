// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/crypto/x509roots/fallback/bundle"
)

// programs are what the image holds, in /usr/local/bin.
var programs = []string{"sluiced", "sluice-cni", "sluicectl"}

const (
	binDir   = "usr/local/bin"
	sbomPath = "usr/share/sluice/sbom.cdx.json"
	caPath   = "etc/ssl/certs/ca-certificates.crt"
)

// result is what was built and where it is.
type result struct {
	Reference, Digest, Layout, Tarball string
}

// build makes everything in a directory beside Out, and puts it there at the end.
func build(o options) (result, error) {
	if err := os.MkdirAll(filepath.Dir(o.Out), 0o755); err != nil {
		return result{}, err
	}
	work, err := os.MkdirTemp(filepath.Dir(o.Out), ".image-")
	if err != nil {
		return result{}, err
	}
	defer os.RemoveAll(work)
	if err := os.Chmod(work, 0o755); err != nil {
		return result{}, err
	}
	r := result{Reference: o.Name + ":" + o.Version, Layout: filepath.Join(o.Out, "oci"), Tarball: filepath.Join(o.Out, "sluice.tar")}
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, arch := range o.Platforms {
		image, err := platformImage(o, arch, work)
		if err != nil {
			return result{}, err
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{
			Add:        image,
			Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch}},
		})
	}
	digest, err := index.Digest()
	if err != nil {
		return result{}, err
	}
	r.Digest = digest.String()
	if err := writeLayout(filepath.Join(work, "oci"), r.Reference, index); err != nil {
		return result{}, err
	}
	if err := archive(filepath.Join(work, "oci"), filepath.Join(work, "sluice.tar"), o.Created); err != nil {
		return result{}, err
	}
	if err := os.RemoveAll(filepath.Join(work, "bin")); err != nil {
		return result{}, err
	}
	if err := os.RemoveAll(o.Out); err != nil {
		return result{}, err
	}
	return r, os.Rename(work, o.Out)
}

// platformImage is the image of one architecture: one layer, from nothing.
func platformImage(o options, arch, work string) (v1.Image, error) {
	dir := filepath.Join(work, "bin", arch)
	if err := compile(o, arch, dir); err != nil {
		return nil, err
	}
	files, sbom, err := contents(o, dir)
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(work, "sbom-"+arch+".cdx.json"), sbom, 0o644); err != nil {
		return nil, err
	}
	tar, err := tarOf(files, o.Created)
	if err != nil {
		return nil, err
	}
	layer, err := tarball.LayerFromOpener(
		func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(tar)), nil },
		tarball.WithMediaType(types.OCILayer), tarball.WithCompressedCaching)
	if err != nil {
		return nil, fmt.Errorf("make the layer: %w", err)
	}
	image := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	image, err = mutate.Append(image, mutate.Addendum{Layer: layer, History: v1.History{
		Created: v1.Time{Time: o.Created}, CreatedBy: "make image", Comment: "static binaries, CA certificates, SBOM",
	}})
	if err != nil {
		return nil, fmt.Errorf("add the layer: %w", err)
	}
	config, err := image.ConfigFile()
	if err != nil {
		return nil, err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", arch
	config.Created = v1.Time{Time: o.Created}
	config.Config = v1.Config{
		Entrypoint: []string{"/" + binDir + "/sluiced"},
		Env:        []string{"PATH=/" + binDir, "SSL_CERT_FILE=/" + caPath},
		WorkingDir: "/",
		Labels:     labels(o),
	}
	return mutate.ConfigFile(image, config)
}

// labels are the annotation keys of the OCI image specification.
func labels(o options) map[string]string {
	const prefix = "org.opencontainers.image."
	return map[string]string{
		prefix + "title":       "sluice",
		prefix + "description": "Traffic redirection for service meshes with eBPF: node daemon, CNI plugin and command",
		prefix + "version":     o.Version,
		prefix + "revision":    o.Revision,
		prefix + "created":     o.Created.Format("2006-01-02T15:04:05Z"),
		prefix + "licenses":    "Apache-2.0 AND (BSD-2-Clause OR GPL-2.0-only)",
		prefix + "source":      "https://" + module,
	}
}

// compile builds the programs for an architecture, the same on every machine.
func compile(o options, arch, dir string) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	args := []string{"build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w -buildid= -X " + module + "/pkg/version.linked=" + o.Version, "-o", dir + "/"}
	for _, p := range programs {
		args = append(args, "./cmd/"+p)
	}
	cmd := exec.Command("go", args...)
	cmd.Dir = o.Source
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch, "GOAMD64=v1", "GOARM64=v8.0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("compile for %s: %w\n%s", arch, err, out)
	}
	return nil
}

// contents are the files of the image, by path, and the SBOM among them.
func contents(o options, dir string) (map[string]file, []byte, error) {
	files := map[string]file{}
	var errs error
	for _, p := range programs {
		data, err := os.ReadFile(filepath.Join(dir, p))
		errs = errors.Join(errs, err)
		files[binDir+"/"+p] = file{data, 0o755}
	}
	license, err := os.ReadFile(filepath.Join(o.Source, "LICENSE"))
	errs = errors.Join(errs, err)
	files["LICENSE"] = file{license, 0o644}
	certificates := authorities()
	files[caPath] = file{certificates, 0o644}
	sbom, err := sbomOf(o, dir)
	errs = errors.Join(errs, err)
	files[sbomPath] = file{sbom, 0o644}
	return files, sbom, errs
}

// authorities are the certificates that Mozilla trusts, as a module of the Go
// project pins them. Those trusted for some names or times only are left out: a
// bundle cannot say so.
func authorities() []byte {
	var out bytes.Buffer
	for root := range bundle.Roots() {
		if root.Constraint == nil {
			_ = pem.Encode(&out, &pem.Block{Type: "CERTIFICATE", Bytes: root.Certificate})
		}
	}
	return out.Bytes()
}

// writeLayout writes an OCI layout with one named index in it. containerd reads
// the first annotation, the others the second.
func writeLayout(dir, reference string, index v1.ImageIndex) error {
	path, err := layout.Write(dir, empty.Index)
	if err != nil {
		return fmt.Errorf("write the layout: %w", err)
	}
	err = path.AppendIndex(index, layout.WithAnnotations(map[string]string{
		"io.containerd.image.name":          reference,
		"org.opencontainers.image.ref.name": reference,
	}))
	if err != nil {
		return fmt.Errorf("write the layout: %w", err)
	}
	return nil
}
