/**
 * Facts of a file: its own description, the bytes of its parts, and a check of them against the hashes in its
 * directory.
 */
import { openPack } from "eigenlora";
import { count, definitions, element, percent, section, short, size, table, workButton } from "./dom.js";

/**
 * @typedef {import("eigenlora").Pack} Pack
 * @typedef {import("./open.js").Opened} Opened
 * @typedef {[name: string, value: string]} Fact
 */

/** @param {number} n @param {string} noun @param {number} of */
const ofAll = (n, noun, of) => (n === of ? `all ${count(of, noun)}` : `${n} of ${count(of, noun)}`);

/** @param {readonly number[]} numbers */
const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);

/** @param {Pack} pack @returns {Fact[]} */
export function packFacts(pack) {
  const { basis, tasks } = pack.directory;
  const { committed, generation } = pack.window.superblock;
  const adapters = tasks.every(({ adapterBytes }) => adapterBytes > 0) ? sum(tasks.map((one) => one.adapterBytes)) : 0;
  const smaller = adapters > committed ? `, ${(adapters / committed).toFixed(1)} times smaller than its adapters` : "";
  const dtypes = [...new Set(pack.modules.flatMap(({ A, B }) => [...A, ...B].map(({ tensor }) => tensor.dtype)))];
  /** @type {Fact[]} */
  const facts = [
    ["size", `${size(committed)}${smaller}`],
    ["holds", `${count(tasks.length, "task")} over ${count(pack.modules.length, "module")}`],
    ["shared", sharedFact(pack)],
    ["made as", `mode ${basis.mode}, ${basis.gauge}, centring ${basis.centering}`],
    ["components in", dtypes.join(", ") || "–"],
    ["coded", basis.step === undefined ? "no" : `yes, in steps of ${short(basis.step)}`],
    ["ΔW error", basis.error === undefined ? "not said" : `at most ${percent(basis.error)} of each task`],
    ["base model", basis.baseModel ?? "not said"],
    [
      "fingerprints",
      pack.modules.some(({ fingerprint }) => fingerprint !== undefined) ? "of the base's weights" : "none",
    ],
    ["made by", basis.producer],
    ["format", `version ${pack.version}, written ${count(generation, "time")}`],
    ["basis", pack.basisId],
  ];
  return facts;
}

/** @param {Pack} pack */
function sharedFact({ modules }) {
  const [A, B] = [modules.filter((one) => one.A.length > 0).length, modules.filter((one) => one.B.length > 0).length];
  if (A + B === 0) return "nothing: each task has residual rows";
  return `components of A in ${ofAll(A, "module", modules.length)}, of B in ${B === A ? "as many" : B || "none"}`;
}

/** @param {Extract<Opened, { kind: "task file" }>["file"]} file @returns {Fact[]} */
export function taskFileFacts({ id, blob, adapterBytes, basisId, signature, brings }) {
  return [
    ["task", id],
    ["size", size(blob.length)],
    ["adapter", adapterBytes > 0 ? size(adapterBytes) : "size not said"],
    ["overrides", brings?.join(", ") || "nothing"],
    ["signature", signature ? `by ${keyName(signature.key)}; its pack checks it` : "not signed"],
    ["basis", basisId],
  ];
}

/** @param {Extract<Opened, { kind: "adapter" }>["adapter"]} adapter @returns {Fact[]} */
export function adapterFacts({ id, byteLength, baseModel, modules, saved, warnings }) {
  const ranks = [...modules.values()].map(({ rank }) => rank);
  const [least, most] = [Math.min(...ranks), Math.max(...ranks)];
  return [
    ["adapter", id],
    ["size", size(byteLength)],
    ["holds", `${count(modules.size, "module")} of rank ${least === most ? most : `${least} to ${most}`}`],
    ["base model", baseModel ?? "not said"],
    ["overrides", saved.map(({ role, name }) => `${role} ${name}`).join(", ") || "nothing"],
    ["warnings", warnings.join("; ") || "none"],
  ];
}

/** @param {Uint8Array} key */
const keyName = (key) => `ed25519:${btoa(String.fromCharCode(...key))}`;

/** The kind of sections that are free to be written (SPEC.md, section 3). */
const FREE = 3;

/**
 * Parts of a pack in bytes, in the order of the file.
 * @param {Pack} pack
 * @returns {{ name: string, kind: string, bytes: number }[]}
 */
function partsOf({ window, directory, modules }) {
  const { committed, directoryLength, basesLength } = window.superblock;
  const tasks = directory.tasks.map(({ section }) => section);
  const bytesOf = (/** @type {(kind: number) => boolean} */ isOf) =>
    sum(directory.sections.filter(({ kind }) => isOf(kind)).map(({ length }) => length));
  const parts = [
    { name: "window", kind: "head", bytes: 1536 },
    { name: "directory", kind: "head", bytes: directoryLength },
    {
      name: modules.some(({ A, B }) => A.length + B.length > 0) ? "components" : "bases, without components",
      kind: "components",
      bytes: basesLength,
    },
    { name: count(tasks.length, "task"), kind: "tasks", bytes: sum(tasks.map(({ length }) => length)) },
    { name: "unused", kind: "free", bytes: bytesOf((kind) => kind === FREE) },
    { name: "of unknown kinds", kind: "free", bytes: bytesOf((kind) => kind > FREE) },
  ];
  const padding = committed - sum(parts.map(({ bytes }) => bytes));
  return [...parts, { name: "padding", kind: "free", bytes: padding }].filter(({ bytes }) => bytes > 0);
}

/** @param {Pack} pack */
export function partsSection(pack) {
  const parts = partsOf(pack);
  const { committed } = pack.window.superblock;
  const rows = parts.map(({ name, bytes }) => [name, size(bytes), percent(bytes / committed)]);
  const label = rows.map(([name, bytes]) => `${name} ${bytes}`).join(", ");
  const bar = element("div", { class: "bar", role: "img", "aria-label": label });
  for (const { kind, bytes } of parts) {
    const piece = element("i", { class: kind });
    piece.style.flexGrow = String(bytes);
    bar.append(piece);
  }
  return section("Bytes by part", bar, table("Parts of the file", ["part", "bytes", "share"], rows));
}

/**
 * Root, signature and a check of every byte.
 * @param {Extract<Opened, { kind: "pack" }>} opened
 * @param {() => void} onRead called when something has been read
 */
export function trustSection({ given, pack }, onRead) {
  const root = element("code", {}, "…");
  const signed = element("span", {}, "…");
  const list = definitions([
    ["root", root],
    ["signature", signed],
  ]);
  const { signature } = pack.window.superblock;
  const tell = (/** @type {Element} */ where) => (/** @type {unknown} */ error) =>
    where.replaceChildren(/** @type {Error} */ (error).message);
  pack.integrity().then((text) => root.replaceChildren(text), tell(root));
  if (!signature) signed.replaceChildren("not signed");
  else {
    const key = keyName(signature.key);
    signedBy(given.input, key).then(
      () => signed.replaceChildren(`by ${key}, and it is right. Whose key that is, you must know`),
      tell(signed),
    );
  }
  const check = workButton(`Check every byte (${size(pack.window.superblock.committed)})`, async (say) => {
    const found = await checkAll(given.input, say);
    onRead();
    return found;
  });
  return section("Integrity", list, check);
}

/** @param {string | File} input @param {string} key @throws TrustError when the signature is not its key's */
async function signedBy(input, key) {
  const pack = await openPack(input, { bases: "later", keys: [key] });
  await pack.close();
}

/**
 * Reads the whole pack against its hashes.
 * @param {string | File} input
 * @param {(text: string) => void} say
 * @returns {Promise<string>} what was found
 */
async function checkAll(input, say) {
  const unchecked = await openPack(input, { bases: "later" });
  const hashed = unchecked.directory.bases.integrity !== undefined;
  const integrity = await unchecked.integrity();
  await unchecked.close();
  const trust = hashed ? { integrity } : {};
  const pack = await openPack(input, { bases: "later", maxResidentBytes: 0, ...trust });
  /** @type {string[]} */
  const wrong = [];
  const note = (/** @type {unknown} */ error) => {
    const { tag, message } = /** @type {{ tag?: string, message: string }} */ (error);
    // A network fault says nothing of the file.
    if (tag !== "format" && tag !== "trust") throw error;
    wrong.push(message);
  };
  let done = 0;
  await pack.bases().then((bases) => bases.close(), note);
  for (const id of pack.tasks.keys()) {
    await pack.load(id).catch(note);
    say(`${++done} of ${count(pack.tasks.size, "task")}`);
  }
  await pack.close();
  if (wrong.length > 0) throw new Error(`${count(wrong.length, "part")} wrong: ${wrong.join("; ")}`);
  const how = hashed ? "have the hashes that the directory names" : "fit their checksums; the pack has no hashes";
  return `Components and ${count(done, "task")} are whole: they ${how}.`;
}
