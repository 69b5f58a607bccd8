// What was seen since the page was opened, for the charts: some minutes of samples.

const KEPT_SECONDS = 600;

export class History {
  constructor() {
    this.times = [];
    this.columns = {};
  }

  add(time, values) {
    for (const name of new Set([...Object.keys(values), ...Object.keys(this.columns)])) {
      this.columns[name] ??= this.times.map(() => null);
      this.columns[name].push(values[name] ?? null);
    }
    this.times.push(time);
    while (this.times[0] < time - KEPT_SECONDS) {
      for (const kept of [this.times, ...Object.values(this.columns)]) kept.shift();
    }
  }

  // Nothing is known of this moment.
  gap(time) {
    this.add(time, {});
  }

  column(name) {
    return this.columns[name] ?? this.times.map(() => null);
  }
}

// The figures of one moment. Memory is stacked: each part is counted with those below it.
export function sample(stats) {
  const levels = stats.requests.filter((request) => request.status === "running").map((request) => request.level);
  const values = {
    low: levels.length ? Math.min(...levels) : null,
    mean: levels.length ? levels.reduce((sum, level) => sum + level, 0) / levels.length : null,
    high: levels.length ? Math.max(...levels) : null,
    start: stats.new_level,
    read: stats.prompt_tokens_per_second,
    written: stats.generated_tokens_per_second,
  };
  let sum = 0;
  for (const { name, size } of memoryParts(stats)) values[name] = sum += size;
  for (const [name, quantiles] of [["ttft", stats.ttft_seconds], ["itl", stats.itl_seconds]]) {
    for (const part of ["p50", "p90", "p99"]) values[`${name}-${part}`] = quantiles?.[part] ?? null;
  }
  return values;
}

// Where bytes are, bottom first.
export const MEMORY_PARTS = [
  { name: "weights", label: "Weights", size: (stats) => stats.weights_bytes + stats.adapter_bytes },
  { name: "kv", label: "KV caches", size: (stats) => stats.kv_bytes },
  { name: "states", label: "States", size: (stats) => stats.state_bytes - stats.window_bytes },
  { name: "windows", label: "Windows", size: (stats) => stats.window_bytes },
  { name: "snapshots", label: "Snapshots", size: (stats) => stats.cached_bytes },
  { name: "free", label: "Free", size: (stats) => stats.free_bytes - stats.cached_bytes },
];

// The parts with their bytes. Figures may be of two neighbouring moments: none is less than nothing.
export const memoryParts = (stats) => MEMORY_PARTS.map((part) => ({ ...part, size: Math.max(part.size(stats), 0) }));
