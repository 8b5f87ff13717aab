package bench

import (
	"fmt"
	"image/color"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/plotutil"
	"gonum.org/v1/plot/text"
	"gonum.org/v1/plot/vg"
)

// chart is a picture of some rows; a file each for SVG and PNG.
type chart struct {
	name, title string
	draw        func(r *Result, p *plot.Plot) (drawn bool, err error)
}

// group is a workload in a chart of bars, and what it is called there.
type group struct{ workload, label string }

var charts = []chart{
	{"latency", "Median latency by backend", func(r *Result, p *plot.Plot) (bool, error) {
		return r.bars(p, "microseconds", total, group{"outbound_connect", "connection, outbound"}, group{"inbound_connect", "connection, inbound"},
			group{"outbound_echo", "echo, outbound"}, group{"inbound_echo", "echo, inbound"})
	}},
	{"rules", "A connection against the number of rules", func(r *Result, p *plot.Plot) (bool, error) {
		return r.lines(p, "rules", "excluded CIDRs", ruleCounts)
	}},
	{"pods", "A connection against the number of pods", func(r *Result, p *plot.Plot) (bool, error) {
		return r.lines(p, "pods", "pods enrolled on the node", podCounts)
	}},
	{"ceiling", "Connections of one pod at once, of at most 150,000", func(r *Result, p *plot.Plot) (bool, error) {
		return r.bars(p, "connections", held, group{"ceiling4", "IPv4"}, group{"ceiling6", "IPv6"})
	}},
}

// size of a chart.
const wide, high = 20 * vg.Centimeter, 10 * vg.Centimeter

// colours that are told apart by the colour-blind too.
var colours = []color.Color{
	color.RGBA{0x99, 0x99, 0x99, 255}, color.RGBA{0xe6, 0x9f, 0x00, 255}, color.RGBA{0xd5, 0x5e, 0x00, 255},
	color.RGBA{0xcc, 0x79, 0xa7, 255}, color.RGBA{0x00, 0x72, 0xb2, 255}, color.RGBA{0x56, 0xb4, 0xe9, 255},
	color.RGBA{0x00, 0x9e, 0x73, 255}, color.RGBA{0xf0, 0xe4, 0x42, 255}, color.RGBA{0x00, 0x00, 0x00, 255},
}

// colourOf is a backend's, alike in every chart.
func colourOf(d definition) color.Color {
	return colours[slices.Index(namesOf(definitions()), d.name)%len(colours)]
}

// drawCharts writes those for which there are figures, and returns them.
func (r *Result) drawCharts(dir string) ([]chart, error) {
	var out []chart
	for _, c := range charts {
		p := plot.New()
		p.Title.Text, p.Title.Padding = c.title, vg.Points(6)
		p.Y.Tick.Marker = wholeTicks{}
		p.Legend.Top, p.Legend.Left, p.Legend.XOffs, p.Legend.Padding = true, true, vg.Points(10), vg.Points(2)
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
			if err := p.Save(wide, high, path); err != nil {
				return nil, fmt.Errorf("write %s: %w", path, err)
			}
		}
		if drawn {
			out = append(out, c)
		}
	}
	return out, nil
}

// bars are groups of workloads, with a bar for each backend that has a figure, and
// the figure above it. The intervals are in the tables: most are narrower than a
// line. The legend stands at the right, where a group more would be.
func (r *Result) bars(p *plot.Plot, unit string, what metric, groups ...group) (bool, error) {
	p.Y.Label.Text = unit
	scale, _ := what.unit()
	most := 0
	for _, g := range groups {
		most = max(most, len(r.backendsOf(g.workload, what)))
	}
	if most == 0 {
		return false, nil
	}
	width := min(0.75*wide/vg.Length(len(groups)+1)/vg.Length(most), vg.Points(24))
	labels, legend := make([]string, len(groups)), map[string]*plotter.BarChart{}
	for k, g := range groups {
		labels[k] = g.label
		shown := r.backendsOf(g.workload, what)
		for i, d := range shown {
			row, _ := r.row(g.workload, d.name, what)
			bar, err := drawBar(p, k, row.P50.Value/scale, width, width*vg.Length(float64(i)-float64(len(shown)-1)/2), colourOf(d))
			if err != nil {
				return false, err
			}
			legend[d.name] = bar
		}
	}
	for _, d := range definitions() {
		if bar := legend[d.name]; bar != nil {
			p.Legend.Add(d.name, bar)
		}
	}
	p.NominalX(labels...)
	p.X.Min, p.X.Max = -0.5, float64(len(groups))
	p.Legend.Left, p.Legend.XOffs = false, 0
	leaveRoom(p, 2)
	return true, nil
}

// drawBar draws one bar of a group, with its figure.
func drawBar(p *plot.Plot, at int, value float64, width, offset vg.Length, colour color.Color) (*plotter.BarChart, error) {
	bar, err := plotter.NewBarChart(plotter.Values{value}, width-1)
	if err != nil {
		return nil, err
	}
	bar.XMin, bar.Offset, bar.Color, bar.LineStyle.Width = float64(at), offset, colour, 0
	figure, err := plotter.NewLabels(plotter.XYLabels{XYs: plotter.XYs{{X: float64(at), Y: value}}, Labels: []string{short(value)}})
	if err != nil {
		return nil, err
	}
	style := &figure.TextStyle[0]
	style.Font.Size, style.Rotation, style.XAlign, style.YAlign = vg.Points(7), math.Pi/2, text.XLeft, text.YCenter
	figure.Offset = vg.Point{X: offset, Y: vg.Points(3)}
	p.Add(bar, figure)
	return bar, nil
}

// backendsOf are those that a workload has a figure for.
func (r *Result) backendsOf(workload string, what metric) []definition {
	return slices.DeleteFunc(definitions(), func(d definition) bool {
		_, ok := r.row(workload, d.name, what)
		return !ok
	})
}

// short is a figure in a chart.
func short(v float64) string {
	if v >= 1000 {
		return fmt.Sprintf("%.0f", v)
	}
	return fmt.Sprintf("%.3g", v)
}

// wholeTicks are the default ones without zeros behind the point.
type wholeTicks struct{}

func (wholeTicks) Ticks(low, high float64) []plot.Tick {
	ticks := plot.DefaultTicks{}.Ticks(low, high)
	for i := range ticks {
		if ticks[i].Label != "" {
			ticks[i].Label = strconv.FormatFloat(ticks[i].Value, 'f', -1, 64)
		}
	}
	return ticks
}

// lines are a workload's backends against a count, with the 95 % intervals.
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
		if len(points.XYs) < 2 { // a busy machine may leave a thousand pods out
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
		line.Color, marks.Color, intervals.Color = colourOf(d), colourOf(d), colourOf(d)
		if d.role == rival { // firewalls may lie upon each other
			line.Dashes = plotutil.Dashes(i)
		}
		p.Add(line, marks, intervals)
		p.Legend.Add(d.name, line)
		drawn = true
	}
	leaveRoom(p, 5)
	return drawn, nil
}

// leaveRoom keeps the legend, of so many lines, above what is drawn. The axis
// starts at nothing: what does not exaggerates.
func leaveRoom(p *plot.Plot, lines int) {
	p.Y.Min = 0
	p.Y.Max *= 1 + 0.07*float64(lines)
}

type errorPoints struct {
	plotter.XYs
	plotter.YErrors
}
