// Charts over time: uPlot with this page's colours, and a legend that shows the latest values, or those under the pointer.

import uPlot from "./vendor/uPlot.esm.js";

import { make, setLabel, setText } from "./dom.js";
import { clock } from "./format.js";
import { color } from "./theme.js";

const LEAST_SPAN = 30;
const MOST_SPAN = 300;
const TIME_STEPS = [5, 10, 15, 30, 60, 120];

// A chart in `holder`, which is a `figure`.
//
// `series`: bottom first, `{name, label, color, width, dash, stacked}`; a stacked one is an area whose value is what it adds to
// those before it. `format`: a value as text; `tick`: one at the vertical axis, and `steps`: what may lie between two of
// them. `stepped`: a value holds until the next one. `top(highest)`: end of that axis. `band`: names of two series, the space
// between which is coloured. `draw(plot)`: draws more, such as events.
export function lineChart(holder, { label, series, format, tick = format, steps, height = 130, stepped, top, band, draw }) {
  const drawn = [...series].reverse();
  const place = (name) => drawn.findIndex((each) => each.name === name) + 1;
  const canvas = make("div", { className: "plot" });
  canvas.setAttribute("role", "img");
  const values = series.map((each) => legendEntry(each));
  const legend = make("ul", { className: "legend" }, ...values.map((entry) => entry.item));
  holder.append(legend, canvas);
  let history = null;

  const plot = new uPlot(
    {
      width: 300,
      height,
      legend: { show: false },
      cursor: { y: false, drag: { x: false, y: false }, points: { show: false } },
      scales: { x: { time: false, range: () => span(history) }, y: { range: (_, low, high) => [0, end(high)] } },
      axes: [
        axis({ values: (_, times) => times.map(clock), space: 90, incrs: TIME_STEPS }),
        axis({ values: (_, ticks) => ticks.map(tick), size: 68, ...(steps && { incrs: steps }) }),
      ],
      series: [{}, ...drawn.map((each) => line(each, stepped))],
      bands: band ? [{ series: band.map(place), fill: () => translucent(color("band")) }] : [],
      hooks: { draw: draw ? [draw] : [], setCursor: [() => showValues()] },
    },
    [[], ...drawn.map(() => [])],
    canvas,
  );
  new ResizeObserver(() => plot.setSize({ width: Math.max(canvas.clientWidth, 120), height })).observe(canvas);

  function end(high) {
    if (top) return top(high ?? 0);
    return high ? high * 1.1 : 1;
  }

  function showValues() {
    if (history === null) return;
    const index = plot.cursor.idx ?? history.times.length - 1;
    let below = 0;
    series.forEach((each, i) => {
      const value = history.column(each.name)[index];
      const own = value == null ? null : value - (each.stacked ? below : 0);
      if (each.stacked) below = value;
      setText(values[i].value, own === null ? "–" : format(own));
    });
    setLabel(canvas, `${label}: ${values.map((entry) => `${entry.name} ${entry.value.textContent}`).join(", ")}`);
  }

  return {
    update(found) {
      history = found;
      plot.setData([history.times, ...drawn.map((each) => history.column(each.name))]);
      showValues();
    },
    redraw: () => history && plot.redraw(),
  };
}

function legendEntry({ label, color: name, dash }) {
  const swatch = make("i", { className: dash ? "swatch dashed" : "swatch" });
  swatch.style.setProperty("--swatch", `var(--${name})`);
  const value = make("b", { textContent: "–" });
  return { name: label, value, item: make("li", {}, swatch, `${label} `, value) };
}

function line({ color: name, width = 1.5, dash, stacked }, stepped) {
  return {
    paths: stepped ? uPlot.paths.stepped({ align: 1 }) : undefined,
    stroke: () => color(name),
    fill: stacked ? () => color(name) : undefined,
    width: stacked ? 0 : width,
    dash,
    points: { show: false },
  };
}

function axis(options) {
  return {
    stroke: () => color("muted"),
    grid: { stroke: () => color("line"), width: 1 },
    ticks: { stroke: () => color("line"), width: 1, size: 4 },
    font: "12px system-ui, sans-serif",
    ...options,
  };
}

// The last minutes, as far as something was seen in them.
function span(history) {
  const times = history?.times ?? [];
  const last = times.at(-1) ?? 0;
  return [last - Math.min(Math.max(last - (times[0] ?? last), LEAST_SPAN), MOST_SPAN), last];
}

const translucent = (rgb) => rgb.replace("rgb(", "rgba(").replace(")", ", 0.25)");
