// Memory: where all bytes are now, as one bar, and over time.

import { lineChart } from "./charts.js";
import { byId, make, setLabel, setText } from "./dom.js";
import { bytes } from "./format.js";
import { MEMORY_PARTS, memoryParts } from "./history.js";
import { drawMoments } from "./marks.js";

const segments = new Map();

// `events()`: those whose conversions are marked.
export function memoryChart(events) {
  return lineChart(byId("memory-chart"), {
    label: "Memory",
    series: MEMORY_PARTS.map(({ name, label }) => ({ name, label, color: name, stacked: true })),
    format: bytes,
    steps: Array.from({ length: 50 }, (_, power) => 2 ** power),
    height: 190,
    top: (high) => Math.max(high, 1),
    draw: (plot) => drawMoments(plot, events()),
  });
}

export function showMemory(stats) {
  const parts = memoryParts(stats);
  const bar = byId("memory-bar");
  for (const { name, label, size } of parts) {
    if (!segments.has(name)) {
      const segment = make("div", { className: "segment" });
      segment.style.background = `var(--${name})`;
      segments.set(name, segment);
      bar.append(segment);
    }
    const segment = segments.get(name);
    segment.style.flexGrow = size;
    segment.title = `${label}: ${bytes(size)}`;
  }
  const used = stats.kv_bytes + stats.state_bytes;
  const share = Math.round((100 * used) / stats.budget_bytes);
  const parked = stats.parked_bytes ? ` ${bytes(stats.parked_bytes)} more are parked outside the budget.` : "";
  setText(
    byId("memory-text"),
    `Running requests hold ${bytes(used)} of their ${bytes(stats.budget_bytes)} (${share}%); the weights take ${bytes(stats.weights_bytes)}, all levels together add ${bytes(stats.adapter_bytes)} to them.${parked}`,
  );
  setLabel(bar, `Memory now: ${parts.map(({ label, size }) => `${label} ${bytes(size)}`).join(", ")}`);
}
