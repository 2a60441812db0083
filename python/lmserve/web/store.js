// Conversations as this browser knows them. The server has the tokens; this has the words, the titles and the settings.

const CONVERSATIONS = "lmserve.conversations";
const SETTINGS = "lmserve.settings";

function read(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

// Ids of 53 bits: two browsers on one key do not meet.
function newId() {
  const [high, low] = crypto.getRandomValues(new Uint32Array(2));
  return (high & 0x1fffff) * 0x100000000 + low;
}

export class Store {
  constructor() {
    this.conversations = read(CONVERSATIONS, []);
    this.settings = read(SETTINGS, {});
  }

  create(from = {}) {
    const made = { title: "New conversation", turns: [], ...from, id: newId() };
    this.conversations.unshift(made);
    return made;
  }

  remove(conversation) {
    this.conversations = this.conversations.filter((other) => other !== conversation);
    this.save();
  }

  save() {
    // One without a turn is nothing to come back to.
    const kept = this.conversations.filter((conversation) => conversation.turns.length);
    for (;;) {
      try {
        localStorage.setItem(CONVERSATIONS, JSON.stringify(kept));
        break;
      } catch (error) {
        // The browser's room is full: the oldest words go, their session stays on the server.
        if (!kept.pop()) throw error;
      }
    }
    localStorage.setItem(SETTINGS, JSON.stringify(this.settings));
  }
}

// What a turn's input is in the API's messages.
export function inputMessages(input) {
  if (input.results) return input.results.map(({ id, content }) => ({ role: "tool", tool_call_id: id, content }));
  return [{ role: "user", content: input.text }];
}

// A conversation as messages, for a server that does not have it (any more).
export function allMessages(conversation, system) {
  const messages = system ? [{ role: "system", content: system }] : [];
  for (const turn of conversation.turns) {
    messages.push(...inputMessages(turn.input));
    const answer = { role: "assistant", content: turn.answer };
    if (turn.calls?.length) {
      answer.tool_calls = turn.calls.map(({ id, name, args }) => ({ id, type: "function", function: { name, arguments: args } }));
    }
    messages.push(answer);
  }
  return messages;
}
