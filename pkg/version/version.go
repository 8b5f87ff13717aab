// Package version says which version of Sluice a program is. It knows no other
// package.
package version

// linked is set by the linker: `make build` and `make image` give it the version that
// the image's tag and the chart have.
var linked = "unreleased"

// String is the version, or "unreleased" in what `go build` alone makes.
func String() string { return linked }
