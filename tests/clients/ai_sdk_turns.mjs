// Three turns of an agent of the Vercel AI SDK: `node ai_sdk_turns.mjs PACKAGES URL MODEL TASK...`, where PACKAGES is the
// folder that has node_modules. It prints what the agent says at the end of each turn.
import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";

const [packages, url, name, ...tasks] = process.argv.slice(2);
const require = createRequire(`${packages}/package.json`);
const { generateText, jsonSchema, stepCountIs, streamText, tool } = require("ai");
const { createOpenAICompatible } = require("@ai-sdk/openai-compatible");

const model = createOpenAICompatible({ name: "lmserve", baseURL: `${url}/v1`, includeUsage: true })(name);
const text = { type: "string" };
const schema = (properties) =>
  jsonSchema({ type: "object", properties, required: Object.keys(properties), additionalProperties: false });
const tools = {
  read_file: tool({
    description: "Read a text file.",
    inputSchema: schema({ path: text }),
    execute: ({ path }) => readFileSync(path, "utf8"),
  }),
  edit_file: tool({
    description: "Write one text in the place of another.",
    inputSchema: schema({ path: text, old: text, new: text }),
    execute: (given) => {
      const before = readFileSync(given.path, "utf8");
      writeFileSync(given.path, before.replaceAll(given.old, given.new));
      return `wrote ${before.length} characters`;
    },
  }),
};

const messages = [];
for (const [number, task] of tasks.entries()) {
  messages.push({ role: "user", content: task });
  const options = { model, system: "You edit files.", messages, tools, stopWhen: stepCountIs(8) };
  if (number % 2) {
    const streamed = streamText(options);
    console.log(await streamed.text);
    messages.push(...(await streamed.response).messages);
  } else {
    const answer = await generateText(options);
    console.log(answer.text);
    messages.push(...answer.response.messages);
  }
}
