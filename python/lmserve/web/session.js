// The verbs of a conversation, each one call of the session API.

import { call, stream } from "./api.js";
import { allMessages, inputMessages } from "./store.js";

const path = (conversation, verb = "") => `v1/sessions/${encodeURIComponent(conversation.id)}${verb}`;
const GONE = new Set(["session_not_found", "session_expired"]);

// Runs a turn and yields it as it grows; the turn is the conversation's once it has ended.
export async function* send(conversation, input, { model, settings }) {
  const { system, tools, ...sampling } = settings;
  const options = { model, session_id: conversation.id, stream: true, stream_options: { include_usage: true }, ...sampling };
  if (tools?.length) options.tools = tools;
  const begin = !conversation.turns.length || (!conversation.raw && !(await holds(conversation, system ?? "")));
  const turn = { input, answer: "", thoughts: "", calls: [], usage: null, finish: null };
  const messages = inputMessages(input);
  yield* read(turn, begin ? { ...options, renew_session: true, messages: [...allMessages(conversation, system), ...messages] } : { ...options, messages });
  conversation.turns.push(turn);
  if (begin) Object.assign(conversation, { system: system ?? "", told: conversation.turns.length });
  yield turn;
}

// Whether the server has this conversation as it is here, under this system prompt.
async function holds(conversation, system) {
  if (conversation.told > conversation.turns.length || conversation.system !== system) return false;
  const session = await unlessGone(call("GET", path(conversation)));
  return session?.turns === serverTurns(conversation, conversation.turns.length);
}

// The first turn on the server holds all that was told with it: `told` turns of this page, one where nothing was told again.
function serverTurns(conversation, turns) {
  return turns - (conversation.told ?? 1) + 1;
}

async function* read(turn, body) {
  for await (const chunk of stream(body)) {
    if (chunk.usage) turn.usage = usageOf(chunk.usage);
    const [choice] = chunk.choices;
    if (!choice) continue;
    const { content, reasoning_content: thoughts, tool_calls: calls } = choice.delta;
    turn.answer += content ?? "";
    turn.thoughts += thoughts ?? "";
    for (const part of calls ?? []) {
      const call = (turn.calls[part.index] ??= { id: part.id, name: "", args: "" });
      call.name += part.function?.name ?? "";
      call.args += part.function?.arguments ?? "";
    }
    turn.finish = choice.finish_reason ?? turn.finish;
    yield turn;
  }
}

function usageOf(usage) {
  return {
    prompt: usage.prompt_tokens,
    cached: usage.prompt_tokens_details?.cached_tokens ?? 0,
    generated: usage.completion_tokens,
  };
}

export function cancel(conversation) {
  return call("POST", path(conversation, "/cancel"));
}

export async function rewind(conversation, turns) {
  const kept = serverTurns(conversation, turns);
  // Before what was told in one turn the server cannot go: the next turn tells it again.
  if (kept > 0) await unlessGone(call("POST", path(conversation, "/rewind"), { turns: kept }));
  conversation.turns.length = turns;
}

export async function fork(conversation, turns, store) {
  const { title, system, raw, told } = conversation;
  const made = store.create({ title: `${title} (branch)`, system, raw, told, turns: structuredClone(conversation.turns.slice(0, turns)) });
  const kept = serverTurns(conversation, turns);
  if (kept > 0) await unlessGone(call("POST", path(conversation, "/fork"), { session_id: made.id, turns: kept }));
  return made;
}

export async function remove(conversation) {
  if (conversation.turns.length) await unlessGone(call("DELETE", path(conversation)));
}

// A session that the server lost is begun again by the next turn.
async function unlessGone(reply) {
  try {
    return await reply;
  } catch (error) {
    if (!GONE.has(error.code)) throw error;
    return null;
  }
}

// The key's sessions that this browser has no words of.
export async function others(store) {
  const known = new Set(store.conversations.map((conversation) => conversation.id));
  const { data } = await call("GET", "v1/sessions?limit=200");
  return data.filter((session) => !known.has(session.id));
}

export async function adopt(id, store) {
  const { turns } = await call("GET", `v1/sessions/${encodeURIComponent(id)}/transcript`);
  const made = store.create({ title: `Session ${id}`, raw: true });
  made.id = id;
  made.turns = turns.map(({ input, output }) => ({ input: { text: input, raw: true }, answer: output, raw: true, calls: [] }));
  return made;
}
