// Light, dark, or as the system has it; and what a colour of the style sheet is at the moment, for canvases.

import { byId, make, setText } from "./dom.js";

const STORE = "dsla-theme";
const NAMES = { auto: "automatic", light: "light", dark: "dark" };

const probe = make("span", { hidden: true });
document.body.append(probe);

// The colour `--name` of the style sheet.
export function color(name) {
  probe.style.color = `var(--${name})`;
  return getComputedStyle(probe).color;
}

// Sets up the button; `onChange` is called whenever colours change.
export function setUpTheme(onChange) {
  const button = byId("theme");
  const apply = (theme) => {
    document.documentElement.dataset.theme = theme;
    setText(button, `Theme: ${NAMES[theme]}`);
    onChange();
  };
  const chosen = () => (localStorage.getItem(STORE) in NAMES ? localStorage.getItem(STORE) : "auto");
  button.addEventListener("click", () => {
    const names = Object.keys(NAMES);
    localStorage.setItem(STORE, names[(names.indexOf(chosen()) + 1) % names.length]);
    apply(chosen());
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", onChange);
  apply(chosen());
}
