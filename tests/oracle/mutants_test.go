package oracle

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// edit takes a rule out of a file.
type edit struct {
	file string
	do   func(rule, source string) (string, error)
}

// statement removes the return statement whose comment names the rule, or which
// follows on the line that the comment ends.
func statement(file string) edit {
	return edit{file, func(rule, source string) (string, error) {
		comment := ` /\*[^*]*\b` + rule + `\b[^*]*\*/`
		marked := regexp.MustCompile(`return [^;]*;(` + comment + `)|(;` + comment + `\n\s*)return [^;]*;`)
		if n := len(marked.FindAllString(source, -1)); n != 1 {
			return "", fmt.Errorf("%s has %d return statements whose comment names %s, not one: mark the one that carries the rule out, or change ruleTable", file, n, rule)
		}
		return marked.ReplaceAllString(source, "$2;$1"), nil
	}}
}

// text replaces a part of a statement.
func text(file, old, by string) edit {
	return edit{file, func(rule, source string) (string, error) {
		if n := strings.Count(source, old); n != 1 {
			return "", fmt.Errorf("%s has %q %d times, not once: ruleTable must say anew how to take %s away", file, old, n, rule)
		}
		return strings.Replace(source, old, by, 1), nil
	}}
}

// mutants builds this test with each rule taken out of Sluice, and wants it to
// fail by a difference, where it passes with the sources as they are.
func mutants(t *testing.T) {
	if _, err := exec.LookPath("clang-19"); err != nil {
		t.Fatal("no clang-19 to compile what is changed: run hack/deps.sh bpf")
	}
	dir := t.TempDir()
	for _, part := range []string{"bpf", "pkg", "tests/kit", "tests/oracle", "docs"} {
		if err := os.CopyFS(filepath.Join(dir, part), os.DirFS(filepath.Join("../..", part))); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"go.mod", "go.sum"} {
		text, err := os.ReadFile(filepath.Join("../..", name))
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name), text, 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	whole := build(t, dir, "whole")
	for _, row := range ruleTable {
		t.Run(row.rule, func(t *testing.T) {
			path := filepath.Join(dir, row.edit.file)
			source, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			changed, err := row.edit.do(row.rule, string(source))
			if err == nil {
				err = os.WriteFile(path, []byte(changed), 0o644)
			}
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := os.WriteFile(path, source, 0o644); err != nil {
					t.Fatal(err)
				}
			}()
			if out, err := runOne(dir, whole, row.rule); err != nil {
				t.Fatalf("Sluice as it is: %v\n%s", err, out)
			}
			out, err := runOne(dir, build(t, dir, row.rule), row.rule)
			if err == nil {
				t.Fatalf("Sluice without %s: nothing differs", row.rule)
			}
			if !strings.Contains(out, "again: go test") {
				t.Fatalf("Sluice without %s fails, but not by a difference: %v\n%s", row.rule, err, out)
			}
		})
	}
}

// build compiles the BPF programs and the test in the copy.
func build(t *testing.T, dir, name string) (binary string) {
	t.Helper()
	binary = filepath.Join(dir, name+".test")
	for _, args := range [][]string{
		{"generate", "./pkg/datapath/"},
		{"test", "-trimpath", "-c", "-o", binary, "./tests/oracle"},
	} {
		cmd := exec.Command("go", args...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "BPF2GO_CC=clang-19", "BPF2GO_STRIP=llvm-strip-19", "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("go %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	return binary
}

func runOne(dir, binary, rule string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, binary, "-test.run", "^TestOneRule$", "-oracle.rule", rule)
	cmd.Dir = filepath.Join(dir, "tests/oracle")
	out, err := cmd.CombinedOutput()
	return string(out), err
}
