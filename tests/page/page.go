// Package page reads the commands of a page of docs/: its fenced blocks of shell.
package page

import (
	"fmt"
	"os"
	"regexp"
)

// Step is a fenced block; its name is what the comment before it says,
// <!-- run: NAME -->, and empty where there is none.
type Step struct{ Name, Script string }

var fence = regexp.MustCompile("(?s)(?:<!-- run: ([a-z-]+) -->\n)?```sh\n(.*?)```")

// Steps are all the blocks of a page, in its order. A name that is not followed by a
// block, or given twice, is an error.
func Steps(path string) (out []Step, err error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	names := map[string]bool{}
	for _, m := range fence.FindAllStringSubmatch(string(text), -1) {
		if m[1] != "" && names[m[1]] {
			return nil, fmt.Errorf("%s has two blocks named %q", path, m[1])
		}
		names[m[1]] = true
		out = append(out, Step{m[1], m[2]})
	}
	for _, at := range mark.FindAllStringIndex(string(text), -1) {
		if m := fence.FindStringSubmatchIndex(string(text[at[0]:])); m == nil || m[0] != 0 || m[2] < 0 {
			return nil, fmt.Errorf("%s: no block of shell follows the comment %q, or its name is not of small letters: put \"```sh\" on the next line", path, text[at[0]:at[1]])
		}
	}
	return out, nil
}

var mark = regexp.MustCompile(`<!-- run:.*?-->`)
