// A conversation as elements.

import { code, render } from "./markdown.js";

function made(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

function button(label, action, title = label) {
  const element = made("button", { type: "button", textContent: label });
  element.setAttribute("aria-label", title);
  element.addEventListener("click", action);
  return element;
}

const REASONS = { length: "cut off at its longest length", tool_calls: "waits for the functions' results" };

// `actions`: edit(number), fork(number), rewind(number), results(calls) of the turn with this number, from 1 on.
export function turnElement(turn, number, actions) {
  const element = made("article", { className: "turn" });
  element.setAttribute("aria-label", `Turn ${number}`);
  element.append(inputElement(turn.input));
  const answer = made("div", { className: "answer" });
  element.append(answer);
  fill(answer, turn, number, actions);
  return element;
}

function inputElement(input) {
  if (input.results) {
    return made("div", { className: "said mine" }, ...input.results.map(({ content }) => made("div", {}, `Result: ${content}`)));
  }
  return made("div", { className: input.raw ? "said mine raw" : "said mine", textContent: input.text });
}

// The answer so far; while it grows there are no `actions`.
export function fill(answer, turn, number, actions) {
  const parts = [];
  if (turn.thoughts) {
    const thoughts = made("details", { className: "thoughts" }, made("summary", { textContent: "Thoughts" }), made("div", { textContent: turn.thoughts }));
    // One that was opened while it grew stays open.
    thoughts.open = answer.querySelector("details")?.open ?? false;
    parts.push(thoughts);
  }
  if (turn.raw) parts.push(made("div", { className: "said raw", textContent: turn.answer }));
  else if (turn.answer || !actions) parts.push(made("div", { className: "said" }, render(turn.answer || "…")));
  for (const call of turn.calls) parts.push(callElement(call));
  if (actions) {
    if (turn.finish === "tool_calls" && actions.isLast(number)) parts.push(resultsForm(turn.calls, actions));
    parts.push(metaElement(turn, number, actions));
  }
  answer.replaceChildren(...parts);
}

function callElement(call) {
  let args = call.args;
  try {
    args = JSON.stringify(JSON.parse(call.args), null, 2);
  } catch {
    // Still on its way, or not JSON: shown as it is.
  }
  return made("div", { className: "call" }, made("strong", { textContent: `Calls ${call.name}` }), code(args, "JSON"));
}

function resultsForm(calls, actions) {
  const areas = calls.map((call) => ({ id: call.id, area: made("textarea", { rows: 2, required: true }), name: call.name }));
  const form = made("form", { className: "call" }, ...areas.map(({ area, name }) => made("label", {}, `What ${name} gave `, area)), made("button", { textContent: "Send results" }));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    actions.results(areas.map(({ id, area }) => ({ id, content: area.value })));
  });
  return form;
}

function metaElement(turn, number, actions) {
  const meta = made("p", { className: "meta" });
  if (turn.usage) {
    const { prompt, cached, generated } = turn.usage;
    meta.append(made("span", { textContent: `read ${prompt} tokens, ${cached} of them cached; wrote ${generated}` }));
  }
  if (REASONS[turn.finish]) meta.append(made("span", { textContent: REASONS[turn.finish] }));
  if (!turn.input.results && !turn.input.raw) meta.append(button("Edit", () => actions.edit(number), `Edit the message of turn ${number}`));
  meta.append(button("Fork", () => actions.fork(number), `Fork after turn ${number}`));
  if (!actions.isLast(number)) meta.append(button("Rewind", () => actions.rewind(number), `Rewind to turn ${number}`));
  return meta;
}

// The list of conversations.
export function listElements(conversations, current, open) {
  return conversations.map((conversation) => {
    const entry = button(conversation.title, () => open(conversation));
    entry.setAttribute("aria-current", String(conversation === current));
    return made("li", {}, entry);
  });
}

export function otherElements(sessions, open) {
  return sessions.map((session) => made("li", {}, button(`Session ${session.id}, turns: ${session.turns}`, () => open(session.id))));
}
