// The dashboard: asks for the server's state and shows it everywhere.

import { Refused } from "./api.js";
import { showChanges } from "./changes.js";
import { lineChart } from "./charts.js";
import { byId, setText } from "./dom.js";
import { clock, count, rate, seconds } from "./format.js";
import { History, sample } from "./history.js";
import { hideKey, setUpKey, wantKey } from "./keys.js";
import { Overview } from "./layers.js";
import { levelChart, setUpLevel, showLevel } from "./level.js";
import { memoryChart, showMemory } from "./memory.js";
import { forgetModel, setUpPlayground } from "./playground.js";
import { poll } from "./poll.js";
import { showRequests } from "./requests.js";
import { setUpTheme } from "./theme.js";

const EVENTS_KEPT = 500;

const STATES = {
  ready: "Live",
  "warming-up": "Live: the server is warming up",
  draining: "Live: the server ends what it has accepted and takes nothing new",
  stopped: "The engine has stopped; the server's log says why",
};

const history = new History();
const overview = new Overview();
let events = [];
let maxLevel = 1;
let goneSince = null;

const charts = [
  levelChart(() => events, () => maxLevel),
  memoryChart(() => events),
  latencyChart("ttft", "Time to first token"),
  latencyChart("itl", "Time between tokens"),
  lineChart(byId("throughput-chart"), {
    label: "Tokens a second",
    series: [
      { name: "read", label: "Read", color: "muted" },
      { name: "written", label: "Written", color: "p50", width: 2 },
    ],
    format: rate,
    tick: count,
  }),
];

function latencyChart(name, label) {
  const shares = { p50: "Half within", p90: "90% within", p99: "99% within" };
  return lineChart(byId(`${name}-chart`), {
    label,
    series: Object.keys(shares).map((share) => ({ name: `${name}-${share}`, label: shares[share], color: share })),
    format: seconds,
  });
}

function onState({ model, stats }, fresh) {
  const now = Date.now() / 1000;
  goneSince = null;
  maxLevel = stats.max_level;
  const found = stats.events.map((event) => ({ ...event, time: event.time - stats.now + now }));
  events = (fresh ? found : [...events, ...found]).slice(-EVENTS_KEPT);
  hideKey("admin");
  status(stats.healthy ? "live" : "gone", STATES[stats.state]);
  setText(byId("model"), model);
  setText(byId("counts"), `${stats.running} running, ${stats.waiting} waiting`);
  overview.show(stats);
  showRequests(stats);
  showLevel(stats);
  showMemory(stats);
  showChanges(events, stats.order);
  history.add(now, sample(stats));
  for (const chart of charts) chart.update(history);
}

function onFailure(error) {
  const now = Date.now() / 1000;
  history.gap(now);
  for (const chart of charts) chart.update(history);
  if (error instanceof Refused && error.status < 500) {
    const asked = wantKey("admin", error);
    status("gone", asked ? "The server asks for the admin key" : `The server shows its state to others only: ${error.message}`);
    return;
  }
  goneSince ??= now;
  forgetModel();
  status("gone", `The server does not answer since ${clock(goneSince)}. Asking again by itself; what is shown is from before.`);
}

function status(kind, text) {
  document.body.dataset.server = kind;
  setText(byId("status"), text);
}

setUpTheme(() => charts.forEach((chart) => chart.redraw()));
setUpPlayground();
const refresh = poll(onState, onFailure);
setUpLevel(refresh);
setUpKey("admin", refresh);
