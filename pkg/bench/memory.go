package bench

import (
	"fmt"
	"os"
	"strconv"
	"strings"
)

// kernelMemory is what the kernel itself has in use, in bytes, on the whole
// machine: on one that does other things too, differences are noise.
func kernelMemory() (float64, error) {
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, fmt.Errorf("read the kernel's memory: %w", err)
	}
	var sum float64
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		switch f[0] {
		case "Slab:", "VmallocUsed:", "Percpu:", "PageTables:":
			kib, err := strconv.ParseFloat(f[1], 64)
			if err != nil {
				return 0, fmt.Errorf("read /proc/meminfo: %w", err)
			}
			sum += kib * 1024
		}
	}
	return sum, nil
}
