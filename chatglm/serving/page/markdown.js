/* Markdown as models write it, shown while it is being written.

   The text is split into blocks by its lines; each block becomes one element. A block whose lines
   did not change is not built again: of a growing answer that is all but the last. Blocks and
   spans become trees (elements.js), never markup: HTML in an answer is text.

   `isOpen` says that more text will come. Then an unclosed ** or ` reaches to the end, a link
   without its end shows its label, and a last line of nothing but markers waits: the reader does
   not see text turn into format. An unclosed fence is a code block in either case.

   Unlike CommonMark, a line break breaks the line, since chat answers mean theirs; a list whose
   indents are off by a space nests all the same; four spaces alone make no code; ** works beside
   Chinese punctuation. */

import { node, patchChild, removeFrom } from "./elements.js";
import { text } from "./texts.js";

const FENCE = /^( *)(`{3,}|~{3,}) *([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6}) +(.*?)(?: +#+)? *$/;
const RULE = /^ {0,3}([-*_])(?: *\1){2,} *$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|(\d{1,9})[.)])( +)/;
const TABLE_RULE = /^ *\|?(?: *:?-+:? *\|)* *:?-+:? *\|? *$/;
const MARKERS_ONLY = /^ *(?:#{1,6}|[-*+_~]{1,3}|`{1,2}|\d{1,3}[.)]?|>|\|[ |:-]*) *$/;
const ENDS_OF_WEB_ADDRESSES = /[.,;:!?'")\]*_~]+$/;
const SAFE_ADDRESS = /^(?:https?:\/\/|mailto:)/i;
// A model that repeats itself writes "> > > >" by the thousand; browsers fall over at such depths.
const MAX_DEPTH = 12;

/** The element of one answer: `show(text, isOpen)` brings it up to date. */
export class Markdown {
  #sources = [];

  constructor(element) {
    this.element = element;
  }

  show(markdown, isOpen) {
    const blocks = splitBlocks(linesOf(markdown, isOpen));
    blocks.forEach(({ kind, lines }, position) => {
      const isGrowing = isOpen && position === blocks.length - 1;
      const source = `${isGrowing}\n${lines.join("\n")}`;
      if (source === this.#sources[position]) return;
      patchChild(this.element, position, kind.build(lines, isGrowing, 0));
      this.#sources[position] = source;
    });
    removeFrom(this.element, blocks.length);
    this.#sources.length = blocks.length;
  }
}

function linesOf(markdown, isOpen) {
  const lines = expandIndents(markdown.split(/\r?\n/));
  if (!isOpen) return lines;
  if (MARKERS_ONLY.test(lines.at(-1))) lines.pop();
  const [before = "", last = ""] = lines.filter((line) => !isBlank(line)).slice(-2);
  // The head of a table is one before the line that makes it one.
  if (last.startsWith("|") && !before.includes("|")) lines.push(last.replace(/[^|]+/g, "-"));
  return lines;
}

/** Tabs before a text become spaces; those in code stay, as a Makefile needs them. */
function expandIndents(lines) {
  let opening;
  return lines.map((line) => {
    if (opening !== undefined) {
      if (closesFence(line, opening)) opening = undefined;
      return line;
    }
    if (FENCE.test(line)) opening = line;
    return line.replace(/^[ \t]+/, (indent) => indent.replaceAll("\t", "    "));
  });
}

function splitBlocks(lines) {
  const blocks = [];
  for (let start = 0; start < lines.length; ) {
    if (isBlank(lines[start])) {
      start += 1;
      continue;
    }
    const kind = KINDS.find((candidate) => candidate.starts(lines, start));
    const end = kind.end(lines, start);
    blocks.push({ kind, lines: lines.slice(start, end) });
    start = end;
  }
  return blocks;
}

function buildBlocks(lines, isOpen, depth) {
  if (depth > MAX_DEPTH) return [paragraph.build(lines, isOpen)];
  const blocks = splitBlocks(lines);
  return blocks.map(({ kind, lines: own }, position) =>
    kind.build(own, isOpen && position === blocks.length - 1, depth),
  );
}

const isBlank = (line) => line.trim() === "";
const indentOf = (line) => line.length - line.trimStart().length;
const oneLine = (lines, start) => start + 1;

/** The first line from `start` on that is not wanted, or the end. */
function endOf(lines, start, isWanted) {
  let end = start;
  while (end < lines.length && isWanted(end)) end += 1;
  return end;
}

// ---- the kinds of blocks: whether one starts at a line, where it ends, its tree

const fence = {
  starts: (lines, start) => FENCE.test(lines[start]),
  end(lines, start) {
    const close = endOf(lines, start + 1, (at) => !closesFence(lines[at], lines[start]));
    return Math.min(close + 1, lines.length);
  },
  build(lines) {
    const [, indent, , information] = FENCE.exec(lines[0]);
    const isClosed = lines.length > 1 && closesFence(lines.at(-1), lines[0]);
    const code = lines.slice(1, isClosed ? -1 : undefined);
    const dedented = code.map((line) => line.slice(Math.min(indent.length, indentOf(line))));
    const copy = node("button", { type: "button", class: "copy-code" }, [text("copy")]);
    const language = node("span", {}, [information.trim().split(/\s/)[0]]);
    const content = node("code", {}, [dedented.join("\n")]);
    return node("figure", { class: "code" }, [
      node("figcaption", {}, [language, copy]),
      node("pre", { tabindex: "0" }, [content]),
    ]);
  },
};

function closesFence(line, opening) {
  const ticks = FENCE.exec(opening)[2];
  const found = line.trim();
  return found.length >= ticks.length && found === ticks[0].repeat(found.length);
}

const heading = {
  starts: (lines, start) => HEADING.test(lines[start]),
  end: oneLine,
  build([line], isOpen) {
    const [, marks, title] = HEADING.exec(line);
    // The page's own headings are h1 and h2; an answer's stand below them.
    return node(`h${Math.min(marks.length + 2, 6)}`, {}, spans(title, isOpen));
  },
};

const rule = {
  starts: (lines, start) => RULE.test(lines[start]),
  end: oneLine,
  build: () => node("hr", {}, []),
};

const quote = {
  starts: (lines, start) => QUOTE.test(lines[start]),
  end: (lines, start) => endOf(lines, start, (at) => QUOTE.test(lines[at])),
  build(lines, isOpen, depth) {
    const inner = lines.map((line) => line.replace(QUOTE, ""));
    return node("blockquote", {}, buildBlocks(inner, isOpen, depth + 1));
  },
};

const list = {
  starts: (lines, start) => ITEM.test(lines[start]),
  end(lines, start) {
    const base = indentOf(lines[start]);
    const isOrdered = ITEM.exec(lines[start])[3] !== undefined;
    let end = start + 1;
    while (end < lines.length) {
      const next = endOf(lines, end, (at) => isBlank(lines[at]));
      if (next === lines.length || !belongs(lines, next, { base, isOrdered, isLazy: next === end }))
        return end;
      // Code keeps its lines, however little they are indented.
      end = fence.starts(lines, next) ? fence.end(lines, next) : next + 1;
    }
    return end;
  },
  build(lines, isOpen, depth) {
    const [, , , number] = ITEM.exec(lines[0]);
    const items = splitItems(lines);
    const built = items.map((own, position) => {
      const isGrowing = isOpen && position === items.length - 1;
      return node("li", {}, unwrapFirst(buildBlocks(own, isGrowing, depth + 1)));
    });
    if (number === undefined) return node("ul", {}, built);
    return node("ol", { start: String(Number(number)) }, built);
  },
};

/** Tight and loose lists look alike: a list does not change its spacing as it grows. */
function unwrapFirst(blocks) {
  const [first, ...rest] = blocks;
  return first?.tag === "p" ? [...first.children, ...rest] : blocks;
}

function belongs(lines, at, { base, isOrdered, isLazy }) {
  const item = ITEM.exec(lines[at]);
  if (indentOf(lines[at]) > base + 1) return true;
  if (item && !rule.starts(lines, at)) return (item[3] !== undefined) === isOrdered;
  if (indentOf(lines[at]) > base) return true;
  return isLazy && !isInterrupted(lines, at);
}

/** The lines of each item of a list, without markers and common indents. */
function splitItems(lines) {
  const base = indentOf(lines[0]);
  const items = [];
  let width, indent, fenceEnd = 0;
  lines.forEach((line, at) => {
    const item = at >= fenceEnd && indentOf(line) <= base + 1 && ITEM.exec(line);
    if (item) {
      width = item[0].length;
      indent = undefined;
      items.push([line.slice(width)]);
      return;
    }
    if (at >= fenceEnd && fence.starts(lines, at)) fenceEnd = fence.end(lines, at);
    // The first indented line says how deep the item's content stands; models vary.
    if (indent === undefined && indentOf(line) > base) indent = Math.min(width, indentOf(line));
    items.at(-1).push(line.slice(Math.min(indent ?? width, indentOf(line))));
  });
  return items;
}

const table = {
  starts: (lines, start) =>
    lines[start].includes("|") &&
    TABLE_RULE.test(lines[start + 1] ?? "") &&
    cellsOf(lines[start + 1]).length === cellsOf(lines[start]).length,
  end: (lines, start) => endOf(lines, start + 2, (at) => lines[at].includes("|")),
  build([head, marks, ...body], isOpen) {
    const sides = cellsOf(marks).map(sideOf);
    const row = (tag, line) => {
      const cells = cellsOf(line);
      return node("tr", {}, sides.map((side, column) =>
        node(tag, { class: side }, spans(cells[column] ?? "", isOpen)),
      ));
    };
    const rows = body.map((line) => row("td", line));
    const parts = [node("thead", {}, [row("th", head)]), node("tbody", {}, rows)];
    return node("div", { class: "table", tabindex: "0" }, [node("table", {}, parts)]);
  },
};

function cellsOf(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function sideOf(mark) {
  if (!mark.endsWith(":")) return "left";
  return mark.startsWith(":") ? "center" : "right";
}

const paragraph = {
  starts: () => true,
  end: (lines, start) =>
    endOf(lines, start + 1, (at) => !isBlank(lines[at]) && !isInterrupted(lines, at)),
  build: (lines, isOpen) =>
    node("p", {}, spans(lines.map((line) => line.trim()).join("\n"), isOpen)),
};

const INTERRUPTING = [fence, heading, rule, quote, list, table];
const KINDS = [...INTERRUPTING, paragraph];
const isInterrupted = (lines, at) => INTERRUPTING.some((kind) => kind.starts(lines, at));

// ---- spans: the first alternative that matches at the leftmost place

const CLOSED_SPANS = [
  /\\(?<escaped>[!-/:-@[-`{-~])/,
  /(?<!`)(?<ticks>`+)(?!`)(?<code>[^]*?[^`])\k<ticks>(?!`)/,
  /\*\*(?!\s)(?<strong>(?:`[^`]*`|[^`])+?)(?<!\s)\*\*(?!\*)/,
  /(?<![*\w])\*(?![\s*])(?<em>[^*]*(?:\*\*[^*]+\*\*[^*]*)*)(?<!\s)\*(?!\*)/,
  /(?<![_\w])_(?![\s_])(?<em2>[^_]+)(?<!\s)_(?!\w)/,
  /~~(?!\s)(?<del>[^~]+)(?<!\s)~~/,
  /\[(?<label>[^[\]]+)\]\((?<href>[^\s()]*(?:\([^\s()]*\)[^\s()]*)*)(?: +"[^"]*")?\)/,
  /<?(?<address>https?:\/\/[\w\-.~:/?#[\]@!$&'()*+,;=%]+)>?/,
  /(?<newline>\n)/,
];
const OPEN_SPANS = [
  /(?<!`)`+(?<openCode>[^`]*)$/,
  /(?<![*\w])\*\*(?!\s)(?<openStrong>(?:(?!\*\*)[^])*)$/,
  /\[(?<openLabel>[^[\]]+)\]\([^\s()]*$/,
];
const joined = (patterns) => new RegExp(patterns.map(({ source }) => source).join("|"), "g");
const CLOSED = joined(CLOSED_SPANS);
const OPEN = joined([...CLOSED_SPANS, ...OPEN_SPANS]);

function spans(source, isOpen) {
  const found = [];
  let end = 0;
  for (const match of source.matchAll(isOpen ? OPEN : CLOSED)) {
    if (match.index > end) found.push(source.slice(end, match.index));
    end = match.index + match[0].length;
    found.push(...span(match, isOpen));
  }
  if (end < source.length) found.push(source.slice(end));
  return found;
}

function span({ 0: whole, groups }, isOpen) {
  const code = groups.code ?? groups.openCode;
  const strong = groups.strong ?? groups.openStrong;
  const em = groups.em ?? groups.em2;
  if (groups.escaped) return [groups.escaped];
  if (groups.newline) return [node("br", {}, [])];
  if (code !== undefined) return [node("code", {}, [code.replace(/^ (.+) $/, "$1")])];
  if (strong !== undefined) return [node("strong", {}, spans(strong, isOpen))];
  if (em !== undefined) return [node("em", {}, spans(em, isOpen))];
  if (groups.del) return [node("del", {}, spans(groups.del, isOpen))];
  if (groups.openLabel) return spans(groups.openLabel, isOpen);
  if (groups.address) return bareLink(groups.address, whole);
  if (!SAFE_ADDRESS.test(groups.href)) return [whole];
  return [link(groups.href, spans(groups.label, isOpen))];
}

function bareLink(address, whole) {
  if (whole.startsWith("<") && whole.endsWith(">")) return [link(address, [address])];
  const kept = address.replace(ENDS_OF_WEB_ADDRESSES, "");
  const [before, after] = whole.split(address);
  return [before, link(kept, [kept]), address.slice(kept.length) + after].filter(Boolean);
}

const link = (href, children) => node("a", { href, target: "_blank", rel: "noopener" }, children);
