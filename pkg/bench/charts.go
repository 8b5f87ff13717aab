package bench

import (
	"fmt"
	"image/color"
	"os"
	"path/filepath"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
)

// chart is a picture of some rows; a file each for SVG and PNG.
type chart struct {
	name, title string
	draw        func(r *Result, p *plot.Plot) (drawn bool, err error)
}

var charts = []chart{
	{"latency", "Median latency by backend", func(r *Result, p *plot.Plot) (bool, error) {
		return r.bars(p, "microseconds", total, "outbound_connect", "inbound_connect", "outbound_echo", "inbound_echo")
	}},
	{"rules", "A connection against the number of rules", func(r *Result, p *plot.Plot) (bool, error) {
		return r.lines(p, "rules", "excluded CIDRs", ruleCounts)
	}},
	{"pods", "A connection against the number of pods", func(r *Result, p *plot.Plot) (bool, error) {
		return r.lines(p, "pods", "pods enrolled on the node", podCounts)
	}},
	{"ceiling", "Connections of one pod at once", func(r *Result, p *plot.Plot) (bool, error) {
		return r.bars(p, "connections", held, "ceiling4", "ceiling6")
	}},
}

// colours that are told apart by the colour-blind too.
var colours = []color.Color{
	color.RGBA{0x99, 0x99, 0x99, 255}, color.RGBA{0xe6, 0x9f, 0x00, 255}, color.RGBA{0xd5, 0x5e, 0x00, 255},
	color.RGBA{0xcc, 0x79, 0xa7, 255}, color.RGBA{0x00, 0x72, 0xb2, 255}, color.RGBA{0x56, 0xb4, 0xe9, 255},
	color.RGBA{0x00, 0x9e, 0x73, 255}, color.RGBA{0xf0, 0xe4, 0x42, 255}, color.RGBA{0x00, 0x00, 0x00, 255},
}

func colourOf(i int) color.Color { return colours[i%len(colours)] }

// drawCharts writes those for which there are figures, and returns them.
func (r *Result) drawCharts(dir string) ([]chart, error) {
	var out []chart
	for _, c := range charts {
		p := plot.New()
		p.Title.Text = c.title
		p.Y.Min = 0
		p.Legend.Top = true
		drawn, err := c.draw(r, p)
		if err != nil {
			return nil, fmt.Errorf("draw %s: %w", c.name, err)
		}
		for _, ext := range []string{"svg", "png"} {
			path := filepath.Join(dir, c.name+"."+ext)
			if !drawn { // of an earlier run
				if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
					return nil, fmt.Errorf("remove an old chart: %w", err)
				}
				continue
			}
			if err := p.Save(20*vg.Centimeter, 10*vg.Centimeter, path); err != nil {
				return nil, fmt.Errorf("write %s: %w", path, err)
			}
		}
		if drawn {
			out = append(out, c)
		}
	}
	return out, nil
}

// bars are groups of workloads, with a bar for each backend and the 95 % interval
// as a line on it.
func (r *Result) bars(p *plot.Plot, unit string, what metric, workloads ...string) (bool, error) {
	const width = 8
	p.Y.Label.Text = unit
	scale, _ := what.unit()
	var shown []definition
	for _, d := range definitions() {
		for _, w := range workloads {
			if _, ok := r.row(w, d.name, what); ok {
				shown = append(shown, d)
				break
			}
		}
	}
	for i, d := range shown {
		offset := vg.Points(width * (float64(i) - float64(len(shown)-1)/2))
		values := make(plotter.Values, len(workloads))
		for k, w := range workloads {
			row, _ := r.row(w, d.name, what)
			values[k] = row.P50.Value / scale
		}
		bars, err := plotter.NewBarChart(values, vg.Points(width-1))
		if err != nil {
			return false, err
		}
		bars.Color, bars.LineStyle.Width, bars.Offset = colourOf(i), 0, offset
		p.Add(bars)
		p.Legend.Add(d.name, bars)
	}
	p.NominalX(workloads...)
	return len(shown) > 0, nil
}

// lines are a workload's backends against a count, both with the 95 % interval.
func (r *Result) lines(p *plot.Plot, workload, label string, counts []int) (bool, error) {
	p.X.Label.Text, p.Y.Label.Text = label, "microseconds, median"
	p.X.Scale, p.X.Tick.Marker = plot.LogScale{}, plot.LogTicks{Prec: -1}
	scale, _ := total.unit()
	drawn := false
	for i, d := range definitions() {
		var points errorPoints
		for _, count := range counts {
			if row, ok := r.row(workload, level(d.name, count), total); ok {
				points.XYs = append(points.XYs, plotter.XY{X: float64(count), Y: row.P50.Value / scale})
				points.YErrors = append(points.YErrors, struct{ Low, High float64 }{
					(row.P50.Value - row.P50.Low) / scale, (row.P50.High - row.P50.Value) / scale,
				})
			}
		}
		if len(points.XYs) == 0 {
			continue
		}
		line, marks, err := plotter.NewLinePoints(points)
		if err != nil {
			return false, err
		}
		intervals, err := plotter.NewYErrorBars(points)
		if err != nil {
			return false, err
		}
		line.Color, marks.Color, intervals.Color = colourOf(i), colourOf(i), colourOf(i)
		p.Add(line, marks, intervals)
		p.Legend.Add(d.name, line)
		drawn = true
	}
	p.Y.Min = 0 // what does not start at nothing exaggerates
	return drawn, nil
}

type errorPoints struct {
	plotter.XYs
	plotter.YErrors
}
