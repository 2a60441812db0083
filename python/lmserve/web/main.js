// Binds the page's elements to conversations and to the server.

import { ApiError, call, key } from "./api.js";
import { Monitor } from "./monitor.js";
import * as session from "./session.js";
import { Store } from "./store.js";
import { fill, listElements, otherElements, turnElement } from "./view.js";

const at = (id) => document.getElementById(id);
const store = new Store();
let current = store.conversations[0] ?? store.create();
let running = null; // the conversation whose turn runs

function notice(message) {
  at("notice").textContent = message ?? "";
  at("notice").hidden = !message;
}

function fail(error) {
  if (error instanceof ApiError && error.status === 401) at("key-dialog").open || at("key-dialog").showModal();
  else notice(error.message);
}

const guarded = (action) => async (...given) => {
  try {
    notice();
    await action(...given);
  } catch (error) {
    fail(error);
  }
};

// The conversation and the list.

const actions = {
  isLast: (number) => number === current.turns.length,
  edit: guarded(async (number) => {
    const { text } = current.turns[number - 1].input;
    await session.rewind(current, number - 1);
    store.save();
    show();
    at("prompt").value = text;
    at("prompt").focus();
  }),
  fork: guarded(async (number) => open(await session.fork(current, number, store))),
  rewind: guarded(async (number) => {
    await session.rewind(current, number);
    store.save();
    show();
  }),
  results: (results) => run({ results }),
};

function show() {
  const turns = current.turns.map((turn, index) => turnElement(turn, index + 1, running ? null : actions));
  const hint = Object.assign(document.createElement("p"), { textContent: "The conversation lives on the server: each message sends only itself." });
  at("log").replaceChildren(...(turns.length ? turns : [hint]));
  at("log").scrollTop = at("log").scrollHeight;
  at("conversations").replaceChildren(...listElements(store.conversations, current, open));
  const last = current.turns.at(-1)?.usage;
  at("summary").textContent = last ? `${last.prompt + last.generated} tokens so far` : "";
  document.title = current.turns.length ? `${current.title} · lmserve` : "lmserve";
}

function open(conversation) {
  if (running) return;
  current = conversation;
  store.save();
  show();
  at("sidebar").classList.remove("open");
  at("menu").setAttribute("aria-expanded", "false");
  at("prompt").focus();
}

function begin() {
  open(store.conversations.find((conversation) => !conversation.turns.length) ?? store.create());
}

async function refreshOthers() {
  const found = await session.others(store);
  at("others-title").hidden = !found.length;
  at("others").replaceChildren(...otherElements(found, guarded(async (id) => { open(await session.adopt(id, store)); await refreshOthers(); })));
}

// A turn.

async function run(input) {
  if (running) return;
  const conversation = current;
  running = conversation;
  at("send").hidden = true;
  at("stop").hidden = false;
  notice();
  show();
  const growing = turnElement({ input, answer: "", thoughts: "", calls: [] }, conversation.turns.length + 1, null);
  if (!conversation.turns.length) at("log").replaceChildren();
  at("log").append(growing);
  const answer = growing.querySelector(".answer");
  let drawn = 0;
  try {
    for await (const turn of session.send(conversation, input, { model: at("model").value, settings: store.settings })) {
      const now = performance.now();
      // Markdown is parsed anew each time: as often as one can see.
      if (now - drawn < 50) continue;
      drawn = now;
      const follows = at("log").scrollHeight - at("log").scrollTop - at("log").clientHeight < 80;
      fill(answer, turn, 0, null);
      if (follows) at("log").scrollTop = at("log").scrollHeight;
    }
    if (conversation.turns.length === 1 && input.text) conversation.title = input.text.slice(0, 60);
  } catch (error) {
    // The server is at the last committed turn, and so is the page; the words go back to where they were written.
    if (input.text) at("prompt").value = input.text;
    fail(error);
  } finally {
    running = null;
    at("send").hidden = false;
    at("stop").hidden = true;
    store.save();
    show();
    at("prompt").focus();
  }
}

function submit() {
  const text = at("prompt").value.trim();
  if (!text || running) return;
  at("prompt").value = "";
  run({ text });
}

const stop = guarded(async () => {
  if (running) await session.cancel(running);
});

at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    submit();
  }
});
at("stop").addEventListener("click", stop);
at("new").addEventListener("click", begin);
at("delete").addEventListener("click", guarded(async () => {
  if (running || (current.turns.length && !confirm(`Delete “${current.title}” here and on the server?`))) return;
  await session.remove(current);
  store.remove(current);
  open(store.conversations[0] ?? store.create());
}));
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) stop();
  if (!event.altKey) return;
  const place = store.conversations.indexOf(current) + { ArrowUp: -1, ArrowDown: 1 }[event.key];
  if (event.code === "KeyN") begin();
  else if (store.conversations[place]) open(store.conversations[place]);
  else return;
  event.preventDefault();
});
at("menu").addEventListener("click", () => {
  const shown = at("sidebar").classList.toggle("open");
  at("menu").setAttribute("aria-expanded", String(shown));
});

// Key, settings, theme.

at("open-key").addEventListener("click", () => at("key-dialog").showModal());
at("key-dialog").addEventListener("close", () => {
  if (at("key-dialog").returnValue !== "save") return;
  key.set(at("key").value.trim());
  at("key").value = "";
  load();
});

const NUMBERS = ["temperature", "top_p", "top_k", "repetition_penalty", "max_tokens", "seed"];

at("open-settings").addEventListener("click", () => {
  for (const name of NUMBERS) at(name).value = store.settings[name] ?? "";
  at("system").value = store.settings.system ?? "";
  at("tools").value = store.settings.tools ? JSON.stringify(store.settings.tools, null, 2) : "";
  at("settings-error").hidden = true;
  at("settings-dialog").showModal();
});
at("settings-dialog").querySelector("form").addEventListener("submit", (event) => {
  if (event.submitter?.value !== "save") return;
  const settings = {};
  for (const name of NUMBERS) if (at(name).value !== "") settings[name] = Number(at(name).value);
  if (at("system").value.trim()) settings.system = at("system").value.trim();
  try {
    const tools = JSON.parse(at("tools").value.trim() || "[]");
    if (!Array.isArray(tools)) throw new SyntaxError("it must be a list");
    if (tools.length) settings.tools = tools;
  } catch (error) {
    event.preventDefault();
    at("settings-error").textContent = `Functions: ${error.message}`;
    at("settings-error").hidden = false;
    return;
  }
  store.settings = settings;
  store.save();
});

function paint(theme) {
  document.documentElement.dataset.theme = theme;
}
at("theme").addEventListener("click", () => {
  const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  localStorage.setItem("lmserve.theme", theme);
  paint(theme);
});
paint(localStorage.getItem("lmserve.theme") ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));

// Pages.

const monitor = new Monitor((error) => (error ? fail(error) : notice()));

function turnTo() {
  const server = location.hash === "#server";
  at("server-page").hidden = !server;
  at("chat-page").hidden = server;
  at("menu").hidden = server;
  at("to-server").toggleAttribute("aria-current", server);
  at("to-chat").toggleAttribute("aria-current", !server);
  for (const link of [at("to-server"), at("to-chat")]) if (link.hasAttribute("aria-current")) link.setAttribute("aria-current", "page");
  if (server) monitor.start();
  else monitor.stop();
}
window.addEventListener("hashchange", turnTo);
document.addEventListener("visibilitychange", () => (document.hidden ? monitor.stop() : turnTo()));

const load = guarded(async () => {
  const { data } = await call("GET", "v1/models");
  at("model").replaceChildren(...data.map(({ id }) => new Option(id, id)));
  await refreshOthers();
});

show();
turnTo();
load();
