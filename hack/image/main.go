// SPDX-License-Identifier: Apache-2.0

// Command image builds Sluice's container image without a container daemon: an
// OCI layout and the same as one tarball, for every platform at once. The same
// source gives the same bytes.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"time"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "image: "+err.Error())
		os.Exit(1)
	}
}

// options say what to build.
type options struct {
	Source    string    // the repository's directory
	Out       string    // directory of the results; its old contents are replaced
	Name      string    // of the image, without tag
	Version   string    // the tag
	Revision  string    // of the source
	Created   time.Time // in the image and of every file
	Platforms []string  // GOARCH of each
}

func run(args []string) error {
	o := options{}
	var platforms, created string
	f := flag.NewFlagSet("image", flag.ContinueOnError)
	f.StringVar(&o.Source, "source", ".", "the repository's directory")
	f.StringVar(&o.Out, "out", "bin/image", "directory of the results: oci/, sluice.tar, and an SBOM for each platform")
	f.StringVar(&o.Name, "name", "localhost/sluice", "name of the image, without tag")
	f.StringVar(&o.Version, "version", "", "version of Sluice, and the image's tag")
	f.StringVar(&o.Revision, "revision", "unknown", "commit of the source")
	f.StringVar(&created, "created", os.Getenv("SOURCE_DATE_EPOCH"), "seconds since 1970, in the image and of its files (env SOURCE_DATE_EPOCH)")
	f.StringVar(&platforms, "platforms", "amd64,arm64", "architectures to build for, separated by commas")
	if err := f.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil
		}
		return err
	}
	seconds, err := strconv.ParseInt(created, 10, 64)
	if err != nil {
		return fmt.Errorf("--created %q is no number of seconds since 1970: give that of the commit (git log -1 --format=%%ct)", created)
	}
	o.Created = time.Unix(seconds, 0).UTC()
	o.Platforms = strings.Split(platforms, ",")
	if err := o.check(); err != nil {
		return err
	}
	built, err := build(o)
	if err != nil {
		return err
	}
	fmt.Printf("%s\n  digest %s\n  platforms %s\n  layout %s\n  tarball %s\n", built.Reference, built.Digest, platforms, built.Layout, built.Tarball)
	return nil
}

// isTag is what the OCI distribution specification allows.
var isTag = regexp.MustCompile(`^[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}$`)

func (o options) check() error {
	if !isTag.MatchString(o.Version) {
		return fmt.Errorf("--version %q cannot be an image's tag: give letters, digits, dots, dashes and underscores, at most 128", o.Version)
	}
	for _, arch := range o.Platforms {
		if arch != "amd64" && arch != "arm64" {
			return fmt.Errorf("--platforms: there are no BPF objects for %q; choose of amd64 and arm64", arch)
		}
	}
	return nil
}
