// Markdown as models write it, built as elements: nothing that a model says becomes HTML.

const BLOCK = /^(```|~~~|#{1,6} |> ?|[-*+] |\d+[.)] |\|.*\||(?:-{3,}|\*{3,}|_{3,})$)/;

export function render(text) {
  const out = document.createDocumentFragment();
  blocks(text.replace(/\r\n?/g, "\n").split("\n"), out);
  return out;
}

function element(name, ...children) {
  const made = document.createElement(name);
  made.append(...children);
  return made;
}

function blocks(lines, out) {
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    const fence = line.match(/^\s*(```+|~~~+)\s*(\S*)/);
    const heading = line.match(/^(#{1,6})\s+(.*?)\s*#*$/);
    if (!line.trim()) {
      at += 1;
    } else if (fence) {
      const body = [];
      at += 1;
      while (at < lines.length && !lines[at].trim().startsWith(fence[1])) body.push(lines[at++]);
      at += 1;
      out.append(code(body.join("\n"), fence[2]));
    } else if (heading) {
      // The page has h1 and h2 of its own.
      out.append(element(`h${Math.min(6, heading[1].length + 2)}`, inline(heading[2])));
      at += 1;
    } else if (/^(-{3,}|\*{3,}|_{3,})$/.test(line.trim())) {
      out.append(element("hr"));
      at += 1;
    } else if (line.startsWith(">")) {
      const body = [];
      while (at < lines.length && lines[at].startsWith(">")) body.push(lines[at++].replace(/^> ?/, ""));
      const quote = element("blockquote");
      blocks(body, quote);
      out.append(quote);
    } else if (line.includes("|") && /^\s*\|?[\s:|-]*-[\s:|-]*$/.test(lines[at + 1] ?? "") && lines[at + 1].includes("|")) {
      const rows = [];
      while (at < lines.length && lines[at].includes("|")) rows.push(lines[at++]);
      out.append(table(rows));
    } else if (/^\s*([-*+]|\d+[.)])\s+/.test(line)) {
      at = list(lines, at, out);
    } else {
      const body = [line];
      at += 1;
      while (at < lines.length && lines[at].trim() && !BLOCK.test(lines[at].trimStart())) body.push(lines[at++]);
      const paragraph = element("p");
      body.forEach((piece, index) => {
        if (index) paragraph.append(element("br"));
        paragraph.append(inline(piece));
      });
      out.append(paragraph);
    }
  }
}

function list(lines, at, out) {
  const marker = /^(\s*)([-*+]|\d+[.)])\s+(.*)$/;
  const first = lines[at].match(marker);
  const made = element(/\d/.test(first[2]) ? "ol" : "ul");
  if (made.tagName === "OL") made.start = parseInt(first[2], 10);
  while (at < lines.length) {
    const item = lines[at].match(marker);
    if (!item || item[1].length > first[1].length + 1) break;
    if (item[1].length < first[1].length || /\d/.test(item[2]) !== /\d/.test(first[2])) break;
    const body = [item[3]];
    at += 1;
    while (at < lines.length && (/^\s{2,}\S/.test(lines[at]) || (!lines[at].trim() && /^\s{2,}\S/.test(lines[at + 1] ?? "")))) {
      body.push(lines[at++].replace(new RegExp(`^\\s{0,${item[1].length + item[2].length + 1}}`), ""));
    }
    const entry = element("li");
    if (body.length === 1) entry.append(inline(body[0]));
    else blocks(body, entry);
    made.append(entry);
    if (!(lines[at] ?? "").trim() && marker.test(lines[at + 1] ?? "")) at += 1;
  }
  out.append(made);
  return at;
}

function cells(row) {
  return row.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
}

function table([head, , ...rows]) {
  const line = (row, kind) => element("tr", ...cells(row).map((cell) => element(kind, inline(cell))));
  return element("table", element("thead", line(head, "th")), element("tbody", ...rows.map((row) => line(row, "td"))));
}

export function code(text, language = "") {
  const body = element("code", text);
  const copy = element("button", "Copy");
  copy.type = "button";
  copy.className = "copy";
  copy.setAttribute("aria-label", language ? `Copy this ${language}` : "Copy this code");
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(text);
    copy.textContent = "Copied";
  });
  const made = element("pre", body, copy);
  made.tabIndex = 0;
  return made;
}

const SPAN = /(`+)([\s\S]*?[^`])\1(?!`)|\*\*(?=\S)([\s\S]*?\S)\*\*|__(?=\S)([\s\S]*?\S)__|\*(?=\S)([^*]*?\S)\*|\b_(?=\S)([^_]*?\S)_\b|~~(?=\S)([\s\S]*?\S)~~|\[([^\]]+)\]\((https?:\/\/[^\s)]+)\)|(https?:\/\/[^\s<>()]+[^\s<>().,;:!?'"])/;

function inline(text) {
  const out = document.createDocumentFragment();
  let rest = text;
  for (let match = rest.match(SPAN); match; match = rest.match(SPAN)) {
    out.append(rest.slice(0, match.index));
    const [whole, , tick, bold, bold2, italic, italic2, struck, label, target, bare] = match;
    if (tick !== undefined) out.append(element("code", tick));
    else if (bold ?? bold2) out.append(element("strong", inline(bold ?? bold2)));
    else if (italic ?? italic2) out.append(element("em", inline(italic ?? italic2)));
    else if (struck) out.append(element("s", inline(struck)));
    else out.append(link(label ?? bare, target ?? bare));
    rest = rest.slice(match.index + whole.length);
  }
  out.append(rest);
  return out;
}

function link(label, target) {
  const made = element("a", label);
  made.href = target;
  made.rel = "noopener noreferrer";
  made.target = "_blank";
  return made;
}
