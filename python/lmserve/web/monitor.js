// The page about the server: /metrics and /v1/usage, asked every two seconds while it is looked at.

import { call, text } from "./api.js";

const EVERY = 2000;
const POINTS = 60;

// The sum of a metric's values over its labels, of those series that have the given ones.
export function read(page, name, labels = "") {
  let sum = 0;
  for (const line of page.split("\n")) {
    if (!line.startsWith(name) || !/[ {]/.test(line[name.length] ?? "")) continue;
    const space = line.lastIndexOf(" ");
    if (line.slice(name.length, space).includes(labels)) sum += Number(line.slice(space + 1));
  }
  return sum;
}

// What each key uses, by its name, of those that the page tells of.
export function keysOf(page) {
  const keys = new Map();
  for (const [, name, labels, value] of page.matchAll(/^lmserve_key_(\w+)\{(.*)\} (\d+)$/gm)) {
    const told = Object.fromEntries([...labels.matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)].map(([, label, text]) => [label, text.replace(/\\(.)/g, "$1")]));
    const used = keys.get(told.key) ?? {};
    used[told.kind ?? told.state ?? name] = Number(value);
    keys.set(told.key, used);
  }
  return keys;
}

const number = new Intl.NumberFormat(undefined, { maximumFractionDigits: 1 });
const percent = new Intl.NumberFormat(undefined, { style: "percent", maximumFractionDigits: 1 });

export class Monitor {
  constructor(failed) {
    this.failed = failed;
    this.rates = [];
    this.before = null;
    this.timer = null;
  }

  start() {
    if (this.timer === null) this.tick();
  }

  stop() {
    clearTimeout(this.timer);
    this.timer = null;
    this.before = null;
  }

  async tick() {
    this.timer = setTimeout(() => this.tick(), EVERY);
    try {
      const [page, usage] = await Promise.all([text("metrics"), call("GET", "v1/usage")]);
      this.show(page, performance.now());
      this.showUsage(usage);
      this.failed(null);
    } catch (error) {
      this.failed(error);
    }
  }

  show(page, now) {
    const value = (name, labels) => read(page, `lmserve_${name}`, labels);
    const generated = value("generated_tokens_total");
    const computed = value("computed_tokens_total");
    const seconds = this.before ? (now - this.before.now) / 1000 : 0;
    const rate = (total, earlier) => (seconds ? Math.max(0, total - earlier) / seconds : 0);
    const speed = rate(generated, this.before?.generated);
    if (this.before) this.rates = [...this.rates, speed].slice(-POINTS);
    const hits = value("prefix_cache_hit_tokens_total");
    const first = value("time_to_first_token_seconds_count");
    tiles({
      Running: number.format(value("requests_running")),
      Waiting: number.format(value("requests_waiting")),
      "Generated tokens/s": number.format(speed),
      "Computed tokens/s": number.format(rate(computed, this.before?.computed)),
      "Prompt tokens from the cache": percent.format(hits + computed ? hits / (hits + computed - generated || 1) : 0),
      "Time to first token": first ? `${number.format((1000 * value("time_to_first_token_seconds_sum")) / first)} ms` : "–",
      Sessions: number.format(value("sessions")),
      Preemptions: number.format(value("preemptions_total")),
    });
    this.before = { now, generated, computed };
    line(this.rates);
    const blocks = Object.fromEntries(["owned", "cached", "free"].map((state) => [state, value("kv_blocks", `state="${state}"`)]));
    cache(blocks);
    table(keysOf(page));
  }

  showUsage(usage) {
    const rows = Object.entries(usage).filter(([name, value]) => name !== "object" && ["string", "number"].includes(typeof value));
    document.querySelector("#usage tbody").replaceChildren(
      ...rows.map(([name, value]) => {
        const row = document.createElement("tr");
        const head = Object.assign(document.createElement("th"), { scope: "row", textContent: name.replaceAll("_", " ") });
        const shown = name === "since" ? new Date(value * 1000).toLocaleString() : typeof value === "number" ? number.format(value) : value;
        row.append(head, Object.assign(document.createElement("td"), { textContent: shown }));
        return row;
      }),
    );
  }
}

function tiles(values) {
  const parts = Object.entries(values).map(([name, value]) => {
    const tile = document.createElement("div");
    tile.append(Object.assign(document.createElement("dt"), { textContent: name }), Object.assign(document.createElement("dd"), { textContent: value }));
    return tile;
  });
  document.querySelector("#tiles").replaceChildren(...parts);
}

function line(rates) {
  const svg = document.querySelector("#rate");
  const top = Math.max(1, ...rates);
  const points = rates.map((rate, at) => `${((POINTS - rates.length + at) * 240) / (POINTS - 1)},${58 - (56 * rate) / top}`);
  const drawn = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  drawn.setAttribute("points", points.join(" "));
  svg.replaceChildren(drawn);
  if (rates.length) document.querySelector("#rate-text").textContent = `Now ${number.format(rates.at(-1))}, at most ${number.format(Math.max(...rates))}.`;
}

function cache({ owned, cached, free }) {
  const all = owned + cached + free || 1;
  document.querySelector("#kv .owned").style.width = `${(100 * owned) / all}%`;
  document.querySelector("#kv .cached").style.width = `${(100 * cached) / all}%`;
  document.querySelector("#kv-text").textContent = `Of ${all} blocks, ${owned} are in use, ${cached} keep what was computed, and ${free} are free.`;
}

function table(keys) {
  document.querySelector("#all-keys").hidden = keys.size < 2;
  const rows = [...keys].map(([name, used]) => {
    const row = document.createElement("tr");
    row.append(Object.assign(document.createElement("th"), { scope: "row", textContent: name }));
    for (const value of [used.in_flight - used.waiting, used.waiting, used.requests_total, used.prompt, used.cached, used.generated]) {
      row.append(Object.assign(document.createElement("td"), { textContent: number.format(value) }));
    }
    return row;
  });
  document.querySelector("#keys tbody").replaceChildren(...rows);
}
