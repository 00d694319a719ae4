/**
 * Elements, tables and numbers in words. All that files say reaches the document as text, never as markup.
 */

/** @typedef {Node | string | number} Content */

/**
 * @template {keyof HTMLElementTagNameMap} T
 * @param {T} tag
 * @param {Readonly<Record<string, string>>} [attributes]
 * @param {...Content} children
 * @returns {HTMLElementTagNameMap[T]}
 */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children.map((one) => (one instanceof Node ? one : plain(String(one)))));
  return made;
}

/**
 * @template {keyof SVGElementTagNameMap} T
 * @param {T} tag
 * @param {Readonly<Record<string, string | number>>} [attributes]
 * @returns {SVGElementTagNameMap[T]}
 */
export function shape(tag, attributes = {}) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, String(value));
  return made;
}

/**
 * Spells out what would turn the direction of writing or cannot be seen, as the command line does.
 * @param {string} text
 */
export function plain(text) {
  const hex = (/** @type {string} */ character) => `\\u${character.charCodeAt(0).toString(16).padStart(4, "0")}`;
  return text.replace(/[\p{Cc}\p{Bidi_Control}\u2028\u2029]/gu, hex);
}

/** @param {string} id of an element of index.html */
export const byId = (id) => /** @type {HTMLElement} */ (document.getElementById(id));

/** Bytes as people read them; 1 kB = 1000 B. @param {number} n */
export function size(n) {
  if (n < 1000) return `${n} B`;
  const [unit, divisor] = n < 1e6 ? ["kB", 1e3] : n < 1e9 ? ["MB", 1e6] : ["GB", 1e9];
  return `${(n / divisor).toFixed(n / divisor < 10 ? 2 : 1)} ${unit}`;
}

/** @param {number} share */
export const percent = (share) => `${(100 * share).toFixed(1)} %`;

/** "1 task", "2,000 tasks". @param {number} n @param {string} noun */
export const count = (n, noun) => `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;

/** @param {number} value */
export const short = (value) => (value === 0 ? "0" : Number(value.toPrecision(3)).toString());

/** Rows that a table shows at most: browsers become slow with more. */
const MOST_ROWS = 500;

/**
 * A table in a region that scrolls by itself. The first cell of a row names it; columns of numbers stand at the right.
 * @param {string} caption
 * @param {readonly string[]} head
 * @param {readonly (readonly Content[])[]} rows
 */
export function table(caption, head, rows) {
  const numeric = head.map((_, c) => c > 0 && rows.every((row) => isNumber(row[c])));
  const cell = (/** @type {"th" | "td"} */ tag, /** @type {Content} */ content, /** @type {number} */ c) =>
    element(tag, { ...(numeric[c] && { class: "number" }), ...(tag === "th" && c === 0 && { scope: "row" }) }, content);
  const body = rows
    .slice(0, MOST_ROWS)
    .map((row) => element("tr", {}, ...row.map((content, c) => cell(c === 0 ? "th" : "td", content, c))));
  const hidden = rows.length - body.length;
  const more = hidden > 0 ? ` (the first ${MOST_ROWS} of ${rows.length.toLocaleString("en")})` : "";
  const columns = head.map((name, c) => element("th", { scope: "col", ...(numeric[c] && { class: "number" }) }, name));
  const made = element("table", {}, element("caption", {}, `${caption}${more}`));
  made.append(element("thead", {}, element("tr", {}, ...columns)), element("tbody", {}, ...body));
  return scrolling(caption, made);
}

/** @param {Content | undefined} content */
function isNumber(content) {
  const text = content instanceof Node ? content.textContent : String(content ?? "");
  return /^[-−]?([\d.,]+( (B|[kMG]B|%|×))?)?$/.test(text ?? "");
}

/**
 * A region that scrolls by itself, by keys too.
 * @param {string} label
 * @param {...Node} children
 */
export const scrolling = (label, ...children) =>
  element("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": plain(label) }, ...children);

/**
 * A section with a heading.
 * @param {string} title
 * @param {...Node} children
 */
export const section = (title, ...children) => element("section", {}, element("h3", {}, title), ...children);

/**
 * A list of names and values.
 * @param {Iterable<readonly [name: string, value: Content]>} entries
 */
export function definitions(entries) {
  const list = element("dl");
  for (const [name, value] of entries)
    list.append(element("div", {}, element("dt", {}, name), element("dd", {}, value)));
  return list;
}

/**
 * A select of values and their names.
 * @param {string} label
 * @param {readonly (readonly [value: string, text: string])[]} options
 */
export function select(label, options) {
  const made = element("select");
  made.append(...options.map(([value, text]) => element("option", { value }, text)));
  return { label: element("label", {}, label, made), select: made };
}

/**
 * A button for work that reads or computes much. It says how far the work is, and what went wrong.
 * @param {string} text
 * @param {(say: (text: string) => void) => Promise<string | undefined>} work gives what to say at the end
 */
export function workButton(text, work) {
  const button = element("button", { type: "button" }, text);
  const said = element("span", { role: "status" });
  const say = (/** @type {string} */ words) => said.replaceChildren(plain(words));
  button.addEventListener("click", async () => {
    button.disabled = true;
    said.className = "";
    try {
      say((await work(say)) ?? "");
    } catch (error) {
      said.className = "wrong";
      say(/** @type {Error} */ (error).message);
    }
    button.disabled = false;
  });
  return element("p", { class: "work" }, button, " ", said);
}

/** Lets the page answer in long work. @returns {() => Promise<void>} to await between two steps */
export function pacer() {
  let last = performance.now();
  return async () => {
    if (performance.now() - last < 30) return;
    await new Promise((resolve) => setTimeout(resolve));
    last = performance.now();
  };
}
