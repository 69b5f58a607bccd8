// What happened and why, newest first, and the latest conversion in one sentence.

import { byId, make, setText } from "./dom.js";
import { clock } from "./format.js";
import { sentences } from "./words.js";

const SHOWN = 40;

export function showChanges(events, order) {
  const found = sentences(events, order);
  const list = byId("changes");
  const latest = found.slice(-SHOWN).reverse();
  const key = latest.map((each) => each.time.toFixed(1) + each.text).join();
  if (list.dataset.key !== key) {
    list.dataset.key = key;
    list.replaceChildren(...latest.map(item));
  }
  byId("no-changes").hidden = latest.length > 0;
  const conversion = found.findLast((each) => each.kind === "level");
  setText(byId("latest"), conversion ? `${clock(conversion.time)}: ${conversion.text}` : "No layer has been converted lately.");
}

function item({ time, kind, text }) {
  const node = make("li", { className: kind === "level" ? "conversion" : "" }, make("time", { textContent: clock(time) }), text);
  node.dataset.kind = kind;
  return node;
}
