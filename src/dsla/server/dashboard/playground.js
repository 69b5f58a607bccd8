// A chat with the model. Each part of an answer says at which level it was written.

import { Refused, ask } from "./api.js";
import { byId, make, setText } from "./dom.js";
import { count, plural, seconds } from "./format.js";
import { hideKey, setUpKey, wantKey } from "./keys.js";
import { events } from "./sse.js";

const TEMPERATURE = 0.7;

// Within so many pixels of its end, the reader of a text is at its end.
const END = 8;

// One conversation: what was said, and what stops the answer that is being written. An answer that comes late belongs to its own.
class Chat {
  messages = [];
  running = null;
}

let chat = new Chat();
let model = null;

export function setUpPlayground() {
  const form = byId("chat-form");
  const prompt = byId("prompt");
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (chat.running === null && prompt.value.trim()) talk(chat, prompt.value.trim());
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  byId("stop").addEventListener("click", () => chat.running?.abort());
  byId("new-chat").addEventListener("click", () => {
    chat.running?.abort();
    chat = new Chat();
    byId("messages").replaceChildren();
    busy(false);
    prompt.focus();
  });
  setUpKey("api", () => form.requestSubmit());
}

// The server may be another one when it is back, with another model.
export function forgetModel() {
  model = null;
}

async function talk(mine, text) {
  const asked = [...mine.messages, { role: "user", content: text }];
  const question = make("p", { className: "question", textContent: text });
  const answer = new Answer();
  const box = byId("messages");
  box.append(question, answer.node);
  box.scrollTop = box.scrollHeight;
  byId("prompt").value = "";
  mine.running = new AbortController();
  busy(true);
  try {
    await stream(asked, answer, mine.running.signal);
    mine.messages = [...asked, { role: "assistant", content: answer.text }];
  } catch (error) {
    if (error.status === 404) forgetModel();
    if (mine !== chat) return;
    if (error instanceof Refused && wantKey("api", error)) {
      question.remove();
      answer.node.remove();
      byId("prompt").value = text;
    } else {
      answer.end(error.name === "AbortError" ? "Stopped." : `There is no answer: ${error.message}`);
      if (answer.text) mine.messages = [...asked, { role: "assistant", content: answer.text }];
    }
  } finally {
    mine.running = null;
    if (mine === chat) busy(false);
  }
}

async function stream(asked, answer, signal) {
  model ??= (await (await ask("api", "v1/models", { signal })).json()).data[0];
  const { id, max_level: top } = model;
  const quality = byId("quality").value;
  const body = {
    model: id,
    messages: asked,
    max_tokens: Number(byId("max-tokens").value) || 256,
    temperature: TEMPERATURE,
    stream: true,
    stream_options: { include_usage: true },
    dsla: { stream_levels: true, ...(quality && { quality }) },
  };
  const response = await ask("api", "v1/chat/completions", { body, signal });
  hideKey("api");
  for await (const data of events(response)) {
    if (data === "[DONE]") break;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    const text = chunk.choices[0]?.delta.content;
    if (text) answer.add(text, chunk.dsla.levels.at(-1)[1], top);
    if (chunk.usage) answer.finish(chunk.usage, chunk.dsla);
  }
}

function busy(on) {
  byId("stop").disabled = !on;
  byId("send").disabled = on;
  byId("messages").setAttribute("aria-busy", on);
  // A button that cannot be used any more has lost the focus.
  if (!on && document.activeElement === document.body) byId("prompt").focus();
}

class Answer {
  constructor() {
    this.text = "";
    this.began = performance.now();
    this.first = null;
    this.part = null;
    this.body = make("div", { className: "parts" });
    this.note = make("p", { className: "note", textContent: "Waiting for the first token …" });
    this.node = make("div", { className: "answer" }, this.body, this.note);
  }

  add(text, level, top) {
    this.first ??= performance.now();
    this.text += text;
    following(() => {
      if (this.part?.dataset.level !== `${level}`) {
        this.part = make("span", { className: "part" });
        this.part.dataset.level = level;
        this.part.style.setProperty("--share", top ? level / top : 0);
        this.body.append(make("span", { className: "chip", textContent: `level ${level}` }), this.part);
      }
      this.part.append(text);
      setText(this.note, "");
    });
  }

  finish(usage, { levels, folded_tokens: folded }) {
    const time = (performance.now() - this.began) / 1000;
    const first = this.first === null ? "" : `, the first after ${seconds((this.first - this.began) / 1000)}`;
    const kept = usage.prompt_tokens_details.cached_tokens;
    const reused = kept ? ` ${count(kept)} of the prompt's ${count(usage.prompt_tokens)} tokens were known from before.` : "";
    const path = levels.map(([from, level], i) => (i ? `level ${level} from token ${count(from)} on` : `level ${level}`)).join(", ");
    const turned = folded ? `, ${count(folded)} cached tokens turned into states` : "";
    this.end(`${plural(usage.completion_tokens, "token")} in ${seconds(time)}${first}. Computed at ${path}${turned}.${reused}`);
  }

  end(note) {
    following(() => setText(this.note, note));
  }
}

// Changes the messages. Whoever reads their end goes on reading it; whoever has scrolled up is left in peace.
function following(change) {
  const box = byId("messages");
  const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < END;
  change();
  if (atEnd) box.scrollTop = box.scrollHeight;
}
