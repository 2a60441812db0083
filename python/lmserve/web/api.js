// The server's API: JSON calls, and the stream of a turn.

const KEY = "lmserve.key";

export class ApiError extends Error {
  constructor(status, error) {
    super(error.message ?? `the server answered ${status}`);
    this.status = status;
    this.code = error.code;
  }
}

export const key = {
  get: () => localStorage.getItem(KEY) ?? "",
  set: (value) => (value ? localStorage.setItem(KEY, value) : localStorage.removeItem(KEY)),
};

async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  if (options.body) headers["Content-Type"] = "application/json";
  // Relative, so that a server under a prefix works.
  const reply = await fetch(path, { ...options, headers });
  if (!reply.ok) {
    const body = await reply.json().catch(() => ({}));
    throw new ApiError(reply.status, body.error ?? {});
  }
  return reply;
}

export async function call(method, path, body) {
  const reply = await request(path, { method, body: body && JSON.stringify(body) });
  return reply.json();
}

export async function text(path) {
  return (await request(path)).text();
}

// Yields the chunks of a streamed chat completion.
export async function* stream(body) {
  const reply = await request("v1/chat/completions", { method: "POST", body: JSON.stringify(body) });
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new ApiError(0, { message: "the connection ended in the middle of the answer" });
    rest += value;
    const events = rest.split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: ?/, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.status ?? 500, chunk.error);
      yield chunk;
    }
  }
}
