// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"cmp"
	"debug/buildinfo"
	"fmt"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"

	cdx "github.com/CycloneDX/cyclonedx-go"
)

const module = "github.com/sluice-mesh/sluice"

// sbomOf lists, in CycloneDX, what each program is linked from: the compiler has
// written it into them. There is nothing else in the image that has a supplier.
func sbomOf(o options, dir string) ([]byte, error) {
	image := cdx.Component{
		BOMRef: "image", Type: cdx.ComponentTypeContainer, Name: "sluice", Version: o.Version,
		Licenses: &cdx.Licenses{{Expression: "Apache-2.0 AND (BSD-2-Clause OR GPL-2.0-only)"}},
	}
	libraries := map[string]cdx.Component{}
	var components []cdx.Component
	var dependencies []cdx.Dependency
	var refs []string
	for _, p := range programs {
		info, err := buildinfo.ReadFile(filepath.Join(dir, p))
		if err != nil {
			return nil, fmt.Errorf("what is %s linked from: %w", p, err)
		}
		ref := "program:" + p
		refs = append(refs, ref)
		components = append(components, cdx.Component{BOMRef: ref, Type: cdx.ComponentTypeApplication, Name: p, Version: o.Version})
		linked := []string{}
		for _, c := range librariesOf(info) {
			libraries[c.BOMRef] = c
			linked = append(linked, c.BOMRef)
		}
		slices.Sort(linked)
		dependencies = append(dependencies, cdx.Dependency{Ref: ref, Dependencies: &linked})
	}
	dependencies = append(dependencies, cdx.Dependency{Ref: image.BOMRef, Dependencies: &refs})
	for _, c := range libraries {
		components = append(components, c)
	}
	slices.SortFunc(components, func(a, b cdx.Component) int { return cmp.Compare(a.BOMRef, b.BOMRef) })
	bom := cdx.NewBOM()
	bom.Metadata = &cdx.Metadata{Timestamp: o.Created.Format("2006-01-02T15:04:05Z"), Component: &image}
	bom.Components, bom.Dependencies = &components, &dependencies
	var out bytes.Buffer
	if err := cdx.NewBOMEncoder(&out, cdx.BOMFileFormatJSON).SetPretty(true).Encode(bom); err != nil {
		return nil, fmt.Errorf("write the SBOM: %w", err)
	}
	return out.Bytes(), nil
}

func librariesOf(info *debug.BuildInfo) []cdx.Component {
	standard := strings.TrimPrefix(info.GoVersion, "go")
	out := []cdx.Component{library("stdlib", standard, "")}
	for _, m := range info.Deps {
		for m.Replace != nil {
			m = m.Replace
		}
		out = append(out, library(m.Path, m.Version, m.Sum))
	}
	return out
}

func library(path, version, sum string) cdx.Component {
	purl := "pkg:golang/" + path + "@" + version
	c := cdx.Component{BOMRef: purl, Type: cdx.ComponentTypeLibrary, Name: path, Version: version, PackageURL: purl}
	if sum != "" {
		c.Properties = &[]cdx.Property{{Name: "go:sum", Value: sum}}
	}
	return c
}
