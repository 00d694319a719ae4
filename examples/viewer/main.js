/**
 * The page: opens files that are chosen, dropped or named by `?url=`, and shows one or two side by side.
 */
import { VERSION } from "eigenlora";
import { byId, plain, size } from "./dom.js";
import { comparisonSection } from "./likeness.js";
import { droppedFiles, givenAddress, givenFiles, open } from "./open.js";
import { createView, readsInWords } from "./view.js";

/** @typedef {import("./open.js").Given} Given @typedef {import("./open.js").Opened} Opened */

/** Files that stand side by side at most. */
const MOST = 2;

/** Files on the page. @type {Opened[]} */
let shown = [];
/** Queue of files to open, one after the other. */
let turn = Promise.resolve();

const status = byId("status");
const failure = byId("failure");

/** @param {() => readonly Given[] | Promise<readonly Given[]>} find */
function openAll(find) {
  turn = turn.then(async () => {
    document.body.setAttribute("aria-busy", "true");
    failure.hidden = true;
    try {
      const given = await find();
      if (given.length === 0) throw new Error("there is no file in it; give a pack, a task file or an adapter");
      for (const one of given) await openOne(one);
    } catch (error) {
      failure.hidden = false;
      failure.replaceChildren(plain(/** @type {Error} */ (error).message));
    }
    status.replaceChildren();
    document.body.setAttribute("aria-busy", "false");
  });
}

/** @param {Given} given */
async function openOne(given) {
  status.replaceChildren(plain(`Reading ${given.name}`));
  const opened = await open(given, (loaded) => status.replaceChildren(plain(`Reading ${given.name}: ${size(loaded)}`)));
  let isTaken = false;
  for (const one of shown) {
    if (await addTask(one, opened)) isTaken = true;
    else if (await addTask(opened, one)) shown = shown.filter((other) => other !== one);
  }
  if (!isTaken) shown = [...shown.slice(0, MOST - 1), opened];
  draw();
}

/**
 * Adds a task file to the pack that it belongs to.
 * @param {Opened} owner
 * @param {Opened} other
 * @returns {Promise<boolean>} whether they are such a pair
 */
async function addTask(owner, other) {
  if (owner.kind !== "pack" || other.kind !== "task file" || owner.pack.basisId !== other.file.basisId) return false;
  const { id } = other.file;
  const { name, input } = other.given;
  await owner.pack.addTask(owner.pack.tasks.has(id) ? `${id}, of ${name}` : id, input);
  articlesOf.delete(owner);
  return true;
}

/** Articles that are drawn already. @type {WeakMap<Opened, HTMLElement>} */
const articlesOf = new WeakMap();

/** @param {Opened} one */
function articleOf(one) {
  const drawn = articlesOf.get(one);
  if (drawn) return drawn;
  const close = () => {
    shown = shown.filter((other) => other !== one);
    void closeOf(one);
    draw();
  };
  const article = createView(one, close, showReads);
  articlesOf.set(one, article);
  return article;
}

function draw() {
  const files = byId("files");
  const articles = shown.map(articleOf);
  files.replaceChildren(...articles);
  files.className = articles.length > 1 ? "two" : "";
  const [first, second] = shown;
  const comparison = first && second && comparisonSection([first, second], showReads);
  byId("comparison").replaceChildren(...(comparison ? [comparison] : []));
  byId("welcome").hidden = shown.length > 0;
  showReads();
  document.title = [...shown.map(({ given }) => plain(given.name)), "EigenLoRA viewer"].join(" – ");
}

/** Says how much of each pack has been read. */
function showReads() {
  for (const one of shown) {
    const line = one.kind === "pack" && articlesOf.get(one)?.querySelector('[data-part="reads"]');
    if (line) line.textContent = readsInWords(one.pack);
  }
}

/** @param {Opened} opened */
async function closeOf(opened) {
  if (opened.kind === "pack") await opened.pack.close();
  if (opened.kind === "adapter") await opened.adapter.close();
}

/** @param {Iterable<File>} files */
const fromInput = (files) =>
  givenFiles(Array.from(files, (file) => ({ file, folder: file.webkitRelativePath.split("/").at(-2) ?? "" })));

const choice = /** @type {HTMLInputElement} */ (byId("choice"));
choice.addEventListener("change", () => {
  const files = Array.from(choice.files ?? []);
  choice.value = "";
  openAll(() => fromInput(files));
});
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  const { dataTransfer } = event;
  // The entries are gone after the event: they are taken at once.
  const files = dataTransfer && droppedFiles(dataTransfer);
  openAll(async () => givenFiles((await files) ?? []));
});

const parameters = new URLSearchParams(location.search);
const form = byId("address-form");
// A server that gives the named files alone has nothing else to be asked for.
form.hidden = parameters.has("only");
form.addEventListener("submit", (event) => {
  event.preventDefault();
  const address = /** @type {HTMLInputElement} */ (byId("address")).value.trim();
  if (address === "") return;
  openAll(() => [givenAddress(address)]);
});
byId("version").append(VERSION);
document.body.setAttribute("aria-busy", "false");
for (const address of parameters.getAll("url")) openAll(() => [givenAddress(address)]);
