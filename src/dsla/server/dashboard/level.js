// The level: the slider, who sets it, and the chart over time with every rise of a running request.

import { ask } from "./api.js";
import { lineChart } from "./charts.js";
import { byId, setText } from "./dom.js";
import { drawRises } from "./marks.js";

let moving = false;

// `onSet` is called after the server has taken a level.
export function setUpLevel(onSet) {
  const slider = byId("level");
  const automatic = byId("automatic");
  slider.addEventListener("input", () => {
    moving = true;
    automatic.checked = false;
    setText(byId("level-value"), slider.value);
  });
  slider.addEventListener("change", () => set(Number(slider.value)));
  automatic.addEventListener("change", () => set(automatic.checked ? null : Number(slider.value)));

  async function set(level) {
    moving = true;
    try {
      await ask("admin", "admin/level", { body: { level } });
      setText(byId("level-error"), "");
    } catch (error) {
      setText(byId("level-error"), `The level could not be set: ${error.message}`);
    } finally {
      moving = false;
      onSet();
    }
  }
}

export function showLevel(stats) {
  const slider = byId("level");
  const automatic = byId("automatic");
  slider.max = stats.max_level;
  slider.disabled = stats.max_level === 0;
  automatic.disabled = !stats.adaptive;
  if (moving) return;
  slider.value = stats.level ?? stats.new_level;
  automatic.checked = stats.level === null;
  setText(byId("level-value"), `${stats.level ?? stats.new_level}`);
  setText(byId("level-text"), explained(stats));
}

function explained(stats) {
  if (stats.max_level === 0) return "This model has no converted layers: every request gets full attention.";
  if (stats.level === null) {
    return `Automatic: new requests start at level ${stats.new_level}, and running ones rise when memory or time gets short.`;
  }
  const back = stats.adaptive ? "" : " This server was started without automatic levels.";
  return `Set by hand: all requests go to level ${stats.level}, as far as they accept it. Running ones rise to it but never fall.${back}`;
}

// `events()`: the events to draw; `top()`: the highest level.
export function levelChart(events, top) {
  return lineChart(byId("level-chart"), {
    label: "Level of the running requests",
    series: [
      { name: "low", label: "Lowest", color: "softmax", width: 1 },
      { name: "high", label: "Highest", color: "dsla", width: 1 },
      { name: "mean", label: "Mean", color: "text", width: 2.5 },
      { name: "start", label: "New requests", color: "muted", dash: [5, 4] },
    ],
    band: ["high", "low"],
    format: (level) => (Number.isInteger(level) ? `${level}` : level.toFixed(1)),
    steps: [1, 2, 5, 10, 20, 50],
    height: 190,
    stepped: true,
    top: () => Math.max(top(), 1),
    draw: (plot) => drawRises(plot, events()),
  });
}
