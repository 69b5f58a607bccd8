// Layers as strips of cells, one cell a layer: high = full attention, low = converted. For one request, or for all together.

import { make, setLabel, setText, byId } from "./dom.js";
import { plural } from "./format.js";

const FLASH = [{ outlineColor: "var(--flash)" }, { outlineColor: "transparent" }];
const calm = matchMedia("(prefers-reduced-motion: reduce)");

// A strip for one request.
export class Strip {
  constructor(layers) {
    this.cells = Array.from({ length: layers }, () => make("i", { className: "cell" }));
    this.node = make("div", { className: "strip" }, ...this.cells);
    this.node.setAttribute("role", "img");
    this.painted = false;
  }

  // Shows which layers are converted; those that have just become so light up.
  paint(converted) {
    const found = new Set(converted);
    this.cells.forEach((cell, layer) => {
      const before = cell.classList.contains("converted");
      cell.classList.toggle("converted", found.has(layer));
      if (this.painted && found.has(layer) && !before) flash(cell);
    });
    this.painted = true;
    const which = found.size ? `: ${[...found].sort((a, b) => a - b).join(", ")}` : "";
    setLabel(this.node, `${found.size} of ${this.cells.length} layers converted${which}`);
  }
}

function flash(cell) {
  if (!calm.matches) cell.animate(FLASH, { duration: 1500, easing: "ease-in" });
}

// The strip of all running requests together: the lower part of each cell is the share that has the layer converted.
export class Overview {
  constructor() {
    this.cells = [];
    this.shares = [];
  }

  show(stats) {
    if (this.cells.length !== stats.layers) this.build(stats.layers);
    const running = stats.requests.filter((request) => request.status === "running");
    const shares = Array.from({ length: stats.layers }, () => 0);
    for (const request of running) for (const layer of request.converted) shares[layer] += 1 / running.length;
    if (!running.length) for (const layer of stats.order.slice(0, stats.new_level)) shares[layer] = 1;
    byId("overview").classList.toggle("idle", !running.length);
    shares.forEach((share, layer) => {
      const { cell, bar } = this.cells[layer];
      bar.style.setProperty("--share", share.toFixed(4));
      if (this.shares.length && share > this.shares[layer] + 1e-6 && running.length) flash(bar);
      const rank = stats.order.indexOf(layer);
      cell.title = rank < 0 ? `Layer ${layer} is never converted` : `Layer ${layer}: the ${ordinal(rank + 1)} to be converted`;
    });
    this.shares = shares;
    const text = summary(running, stats);
    setText(byId("overview-text"), text);
    setLabel(byId("overview"), text);
  }

  build(layers) {
    const every = layers > 40 ? 5 : 1;
    this.shares = [];
    this.cells = Array.from({ length: layers }, (_, layer) => {
      const bar = make("i", { className: "share" });
      const number = make("span", { textContent: layer % every ? "" : layer });
      return { bar, cell: make("div", { className: "layer" }, bar, number) };
    });
    byId("overview").replaceChildren(...this.cells.map(({ cell }) => cell));
  }
}

function summary(running, stats) {
  if (!running.length) {
    return `No request is running. One that starts now would have ${stats.new_level} of ${stats.layers} layers converted, if that saves memory.`;
  }
  const all = running.length * stats.layers;
  const converted = running.reduce((sum, request) => sum + request.converted.length, 0);
  const requests = running.length === 1 ? "1 request is running" : `${plural(running.length, "request")} are running`;
  return `${requests}. ${converted} of ${plural(all, "layer")} ${running.length > 1 ? "in all of them together " : ""}are converted (${Math.round((100 * converted) / all)}%).`;
}

function ordinal(number) {
  const tens = number % 100;
  const ending = tens > 10 && tens < 14 ? "th" : (["th", "st", "nd", "rd"][number % 10] ?? "th");
  return `${number}${ending}`;
}
