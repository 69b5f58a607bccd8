// The forms that ask for a key, `admin` or `api`, where the server wants one.

import { hasKey, setKey } from "./api.js";
import { byId, setText } from "./dom.js";

// What a key is made of: printable ASCII. `fetch` throws where a header holds other characters, as if nobody answered.
const KEY = /^[!-~]+$/;
const NO_KEY = "This is no key: keys have no spaces, and only characters of ASCII. Copy it again, with nothing around it.";

export function setUpKey(kind, onKey) {
  const form = byId(`${kind}-key-form`);
  const field = byId(`${kind}-key`);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const key = field.value.trim();
    const fits = KEY.test(key);
    field.value = "";
    setText(byId(`${kind}-key-error`), fits ? "" : NO_KEY);
    if (!fits) {
      field.focus();
      return;
    }
    setKey(kind, key);
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
