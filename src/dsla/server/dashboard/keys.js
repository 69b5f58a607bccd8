// The forms that ask for a key, `admin` or `api`, where the server wants one.

import { hasKey, setKey } from "./api.js";
import { byId, setText } from "./dom.js";

export function setUpKey(kind, onKey) {
  const form = byId(`${kind}-key-form`);
  const field = byId(`${kind}-key`);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    setKey(kind, field.value.trim());
    field.value = "";
    form.hidden = true;
    onKey();
  });
}

// Shows the form where a key may help against this refusal; whether it may.
export function wantKey(kind, refusal) {
  const helps = refusal.status === 401 || (refusal.status === 403 && hasKey(kind));
  if (helps) {
    setText(byId(`${kind}-key-why`), refusal.message);
    byId(`${kind}-key-form`).hidden = false;
  }
  return helps;
}

export function hideKey(kind) {
  byId(`${kind}-key-form`).hidden = true;
}
