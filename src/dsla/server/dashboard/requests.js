// The table of requests: layers, level, tokens, memory, age, and a button that cancels.

import { ask } from "./api.js";
import { byId, make, setLabel, setText } from "./dom.js";
import { age, bytes, count, plural, shortId } from "./format.js";
import { Strip } from "./layers.js";

const rows = new Map();

export function showRequests(stats) {
  const shown = stats.requests;
  const ids = new Set(shown.map((request) => request.id));
  for (const [id, row] of rows) {
    if (ids.has(id)) continue;
    row.node.remove();
    rows.delete(id);
  }
  const body = byId("requests");
  shown.forEach((request, place) => {
    if (!rows.has(request.id)) rows.set(request.id, new Row(request.id, stats.layers));
    const row = rows.get(request.id);
    row.show(request, stats);
    if (body.children[place] !== row.node) body.insertBefore(row.node, body.children[place] ?? null);
  });
  const more = stats.running + stats.waiting - shown.length;
  setText(byId("more-requests"), more > 0 ? `${plural(more, "more request")} wait${more === 1 ? "s" : ""}.` : "");
  byId("no-requests").hidden = shown.length > 0;
  byId("requests-table").hidden = shown.length === 0;
}

class Row {
  constructor(id, layers) {
    this.strip = new Strip(layers);
    this.cells = Object.fromEntries(
      ["Level", "Tokens", "Memory", "Age"].map((name) => [name, labelled("td", name)]),
    );
    const button = make("button", { type: "button", textContent: "Cancel" });
    setLabel(button, `Cancel request ${id}`);
    button.addEventListener("click", () => cancel(id, button));
    const name = make("th", { scope: "row", title: id, className: "name" }, shortId(id));
    const strip = make("td", { className: "layers" }, this.strip.node);
    this.node = make("tr", {}, name, strip, ...Object.values(this.cells), make("td", {}, button));
    this.node.dataset.request = id;
  }

  show(request, stats) {
    const waits = request.status === "waiting";
    this.node.classList.toggle("waiting", waits);
    this.strip.paint(request.converted);
    setText(this.cells.Level, `${request.level} of ${stats.max_level}`);
    setText(this.cells.Tokens, tokens(request));
    setText(this.cells.Memory, waits ? "waits" : bytes(request.memory_bytes));
    setText(this.cells.Age, age(request.age_seconds));
  }
}

function labelled(tag, name) {
  const node = make(tag);
  node.dataset.label = name;
  return node;
}

function tokens(request) {
  const read = Math.min(request.computed_tokens, request.prompt_tokens);
  const prompt = read < request.prompt_tokens ? `${count(read)} of ${count(request.prompt_tokens)}` : count(read);
  return `${prompt} read, ${count(request.completion_tokens)} of ${count(request.max_tokens)} written`;
}

async function cancel(id, button) {
  const said = byId("cancel-text");
  button.disabled = true;
  try {
    await ask("admin", `admin/cancel/${encodeURIComponent(id)}`, { body: {} });
    setText(said, `Request ${shortId(id)} was cancelled.`);
  } catch (error) {
    setText(said, `Request ${shortId(id)} could not be cancelled: ${error.message}`);
    button.disabled = false;
  }
}
