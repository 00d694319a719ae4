/**
 * One opened file on the page: its facts, parts, tasks and pictures.
 */
import { count, definitions, element, section, size, workButton } from "./dom.js";
import { adapterFacts, packFacts, partsSection, taskFileFacts, trustSection } from "./facts.js";
import { createFactorMaps, createHeatMaps } from "./heat.js";
import { likenessSection } from "./likeness.js";
import { createSharing } from "./sharing.js";
import { metadataSection, taskDetails, tasksTable } from "./tasks.js";

/** @typedef {import("./open.js").Opened} Opened @typedef {import("eigenlora").Pack} Pack */

/** Bytes of tasks that are read without being asked for. */
const READ_AT_ONCE = 1e6;

/**
 * @param {Opened} opened
 * @param {() => void} onClose the visitor wants it away
 * @param {() => void} onRead called when something has been read
 */
export function createView(opened, onClose, onRead) {
  const close = element(
    "button",
    { type: "button", class: "plain", "aria-label": `Close ${opened.given.name}` },
    "Close",
  );
  close.addEventListener("click", onClose);
  const { name } = opened.given;
  const title = element("header", {}, element("h2", { tabindex: "-1" }, name), close);
  const article = element("article", { "aria-label": name }, title);
  if (opened.kind === "pack") article.append(...packSections(opened, onRead));
  if (opened.kind === "task file") {
    const { file } = opened;
    const about = "A task file. Its numbers can be shown once its pack is open too.";
    article.append(element("p", {}, about), definitions(taskFileFacts(file)), metadataSection(file.metadata));
  }
  if (opened.kind === "adapter") {
    const { adapter } = opened;
    const factors = createFactorMaps(adapter);
    article.append(definitions(adapterFacts(adapter)), metadataSection(adapter.metadata), factors.node);
    void factors.draw();
  }
  return article;
}

/**
 * @param {Extract<Opened, { kind: "pack" }>} opened
 * @param {() => void} onRead
 */
function packSections(opened, onRead) {
  const { pack } = opened;
  /** Terms of the tasks that are read. @type {Map<string, readonly import("eigenlora").TaskTerm[]>} */
  const terms = new Map();
  const heat = createHeatMaps(pack, onRead, (id, blob) => {
    if (terms.has(id)) return;
    terms.set(id, blob.terms);
    sharing.draw(terms);
  });
  const details = element("div", { class: "task" });
  /** @param {string} id @param {number} [module] */
  const choose = (id, module) => {
    const task = pack.tasks.get(id);
    if (!task) return;
    details.replaceChildren(element("h4", {}, `Task ${id}`), taskDetails(task));
    void heat.choose(id, module);
  };
  const sharing = createSharing(pack, choose);
  sharing.draw(terms);
  heat.tasks.addEventListener("change", () => choose(heat.tasks.value));
  const readAll = (/** @type {(text: string) => void} */ say) => readTasks(pack, terms, () => sharing.draw(terms), say);
  const bytes = [...pack.tasks.values()].reduce((sum, task) => sum + task.bytes, 0);
  const [first] = pack.tasks.keys();
  if (first !== undefined && bytes <= READ_AT_ONCE) {
    choose(first);
    void readAll(() => {}).then(onRead);
  } else {
    const button = workButton(`Read all tasks (${size(bytes)})`, (say) => readAll(say).finally(onRead));
    sharing.line.after(button);
  }
  return [
    element("p", { class: "caption", "data-part": "reads" }),
    definitions(packFacts(pack)),
    partsSection(pack),
    section("Tasks", tasksTable(pack, choose), details),
    sharing.node,
    heat.node,
    likenessSection(pack, onRead),
    trustSection(opened, onRead),
  ];
}

/** @param {Pack} pack */
export function readsInWords({ reads, window }) {
  const { requests, bytes, whole } = reads;
  const all = size(window.superblock.committed);
  if (whole) return `Read whole (${all}), since its server has no ranges.`;
  return `Read so far: ${size(bytes)} of ${all}, in ${count(requests, "request")}.`;
}

/**
 * Reads what the tasks do to which module.
 * @param {Pack} pack
 * @param {Map<string, readonly import("eigenlora").TaskTerm[]>} terms of each task, filled here
 * @param {() => void} draw called now and then, and at the end
 * @param {(text: string) => void} say called with the progress in words
 * @returns {Promise<string>} what could not be read, and why
 */
async function readTasks(pack, terms, draw, say) {
  /** @type {string[]} */
  const wrong = [];
  let drawn = performance.now();
  for (const id of pack.tasks.keys()) {
    await pack.load(id).then(
      (blob) => terms.set(id, blob.terms),
      (error) => wrong.push(error.message),
    );
    say(`${terms.size} of ${count(pack.tasks.size, "task")}`);
    if (performance.now() - drawn < 500) continue;
    draw();
    drawn = performance.now();
  }
  draw();
  return wrong.join("; ");
}
