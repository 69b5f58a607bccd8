// What the engine's events mean, in plain words.

import { bytes, count, plural, shortId } from "./format.js";

const REASONS = {
  memory: "the next step would not have fitted into memory",
  "memory pressure": "memory was getting short",
  "latency pressure": "answers were getting too slow",
  "long prompt": "its prompt alone would take most of the memory",
  "by hand": "the level was set by hand",
  start: "new requests start at this level",
  "pressure gone": "the pressure is gone",
  "no memory for states": "there is no room for its states yet",
  "adapter not foldable": "this adapter's states cannot be had from keys and values",
};

const because = (reason) => REASONS[reason] ?? reason;

const who = (event) => `Request ${shortId(event.request_id)}`;

const WORDS = {
  level: (event, order) => {
    const layers = order.slice(event.from_level, event.to_level);
    const which = layers.length <= 6 ? ` (${layers.join(", ")})` : "";
    const levels = `level ${event.from_level} to ${event.to_level}`;
    const text = `${who(event)}: ${plural(layers.length, "layer")}${which} converted, ${levels}, after ${count(event.from_token)} tokens`;
    return `${text}: ${because(event.reason)}. ${freed(event.freed_bytes)}`;
  },
  "new-level": (event) => `New requests ${moved(event)} ${event.to_level}: ${because(event.reason)}.`,
  "new-fast-level": (event) =>
    `New requests that get faster by it ${moved(event)} ${event.to_level}: ${because(event.reason)}.`,
  "force-level": (event) =>
    event.to_level === null ? "Levels are automatic again." : `The level was set to ${event.to_level} by hand.`,
  defer: (event) => `${who(event)} stays at level ${event.from_level} for now: ${because(event.reason)}.`,
  preempt: (event) => `${who(event)} had to give way and waits: what it remembers is ${event.reason}.`,
  cancel: (event) => `${who(event)} was cancelled.`,
  error: (event) => `${who(event)} failed: ${event.reason}`,
};

const moved = (event) => `now start at ${event.to_level > event.from_level ? "a higher level," : "a lower level,"}`;

const freed = (size) => (size >= 0 ? `${bytes(size)} freed.` : `${bytes(-size)} taken.`);

// Events in sentences, oldest first: `{time, kind, text}`. What was done to several requests at once is one sentence.
export function sentences(events, order) {
  const groups = [];
  for (const event of events) {
    if (!(event.kind in WORDS)) continue;
    const last = groups.at(-1);
    if (last && event.kind === "level" && alike(last[0], event)) last.push(event);
    else groups.push([event]);
  }
  return groups.map((group) => ({ time: group[0].time, kind: group[0].kind, text: sentence(group, order) }));
}

const alike = (first, event) =>
  first.kind === event.kind && first.reason === event.reason && event.time - first.time < 1;

function sentence(group, order) {
  if (group.length === 1) return WORDS[group[0].kind](group[0], order);
  const requests = new Set(group.map((event) => event.request_id)).size;
  const layers = group.reduce((sum, event) => sum + event.to_level - event.from_level, 0);
  const size = group.reduce((sum, event) => sum + event.freed_bytes, 0);
  const whose = requests === 1 ? who(group[0]) : `${requests} requests`;
  return `${whose}: ${plural(layers, "layer")} converted: ${because(group[0].reason)}. ${freed(size)}`;
}
