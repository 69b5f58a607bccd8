// Asks for the server's state about once a second, more rarely while it is gone, and notices by itself when it is back.

import { ask } from "./api.js";

const PERIOD = 1000;
const LONGEST = 15000;
const TIMEOUT = 10000;
const WAITING_SHOWN = 10;

// `onState(answer, fresh)`: `fresh` = its events are all there are, not only those since the last answer.
// `onFailure(error, wait)`: it did not answer, or refused; it is asked again after `wait` milliseconds.
// Returns a function that asks at once.
export function poll(onState, onFailure) {
  let known = 0;
  let failures = 0;
  let timer = 0;
  let asking = false;
  let again = false;

  async function once() {
    clearTimeout(timer);
    // What is on its way may be from before what the caller has just done.
    again = asking;
    if (asking) return;
    asking = true;
    let answer = null;
    const fresh = known === 0;
    try {
      const path = `admin/state?events_after=${known}&waiting=${WAITING_SHOWN}`;
      const response = await ask("admin", path, { signal: AbortSignal.timeout(TIMEOUT) });
      answer = await response.json();
      known = answer.stats.event_count;
      failures = 0;
      timer = setTimeout(once, PERIOD);
    } catch (error) {
      // Whoever answers next may be another server, which counts anew.
      known = 0;
      failures += 1;
      const wait = Math.min(PERIOD * 2 ** (failures - 1), LONGEST);
      timer = setTimeout(once, wait);
      onFailure(error, wait);
    } finally {
      asking = false;
    }
    if (answer !== null) onState(answer, fresh);
    if (again) once();
  }

  document.addEventListener("visibilitychange", () => document.hidden || once());
  once();
  return once;
}
