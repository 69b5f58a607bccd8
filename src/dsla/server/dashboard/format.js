// Numbers as people read them.

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

export const count = (number) => Math.round(number).toLocaleString("en");

export const plural = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;

export function bytes(size) {
  let unit = 0;
  while (Math.abs(size) >= 1024 && unit < UNITS.length - 1) {
    size /= 1024;
    unit += 1;
  }
  return `${unit && Math.abs(size) < 100 ? size.toFixed(1) : Math.round(size)} ${UNITS[unit]}`;
}

// How long something took.
export function seconds(time) {
  if (time === 0) return "0 s";
  if (time < 0.9995) return `${time < 0.01 ? (time * 1000).toFixed(1) : Math.round(time * 1000)} ms`;
  return `${time < 10 ? time.toFixed(2) : time.toFixed(1)} s`;
}

// How long ago something was.
export function age(time) {
  if (time >= 7200) return `${Math.round(time / 3600)} h`;
  return time >= 120 ? `${Math.round(time / 60)} min` : `${Math.max(Math.round(time), 0)} s`;
}

export const rate = (number) => `${number >= 100 ? count(number) : number.toFixed(1)} tokens/s`;

// A time of day from seconds since 1970.
export const clock = (time) => new Date(time * 1000).toLocaleTimeString("en-GB");

// Engines name an answer by the id of its HTTP request and a number: `3f2a...~7`. Long ids are cut in the middle.
export function shortId(id) {
  return id.length <= 14 ? id : `${id.slice(0, 6)}…${id.slice(id.includes("~") ? id.lastIndexOf("~") : -6)}`;
}
