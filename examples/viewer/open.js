/**
 * Opens what a visitor gives: packs and task files, and adapters with the JSON files in their folders. The ending of a
 * file's name says its kind.
 */
import { openPack } from "eigenlora";
import { readDiffusers, readGguf, readKohya, readMlx, readOnnxAdapter, readPeft, readTaskFile } from "eigenlora/build";

/**
 * @typedef {import("eigenlora").Pack} Pack
 * @typedef {import("eigenlora/build").Adapter} Adapter
 * @typedef {import("eigenlora/build").TaskFile} TaskFile
 *
 * @typedef {object} Given
 * @property {string} name of the file
 * @property {string} folder that it lies in; empty where that is not known
 * @property {File | string} input a file, or an address
 * @property {(name: string) => Promise<unknown>} sibling the JSON of a file in the same folder; undefined where there
 *   is none
 *
 * @typedef {{ given: Given } & ({ kind: "pack", pack: Pack } | { kind: "task file", file: TaskFile } | { kind:
 *   "adapter", adapter: Adapter })} Opened
 */

/**
 * Readers of adapters that are one file, by its ending. @type {ReadonlyMap<string, typeof readGguf | typeof
 * readOnnxAdapter>}
 */
const READERS = new Map([
  ["gguf", readGguf],
  ["onnx_adapter", readOnnxAdapter],
]);

/**
 * @param {Given} given
 * @param {(loaded: number) => void} onBytes called with the bytes of a pack that are read
 * @returns {Promise<Opened>}
 * @throws EigenLoraError in the words of the library
 */
export async function open(given, onBytes) {
  const ending = /\.(\w+)$/.exec(given.name)?.[1]?.toLowerCase() ?? "";
  if (ending === "eigentask") return { given, kind: "task file", file: await readTaskFile(given.input) };
  if (ending === "safetensors" || READERS.has(ending))
    return { given, kind: "adapter", adapter: await readAdapter(given, READERS.get(ending)) };
  const onProgress = (/** @type {import("eigenlora").Progress} */ progress) => {
    if ("loaded" in progress) onBytes(progress.loaded);
  };
  return { given, kind: "pack", pack: await openPack(given.input, { bases: "later", onProgress }) };
}

/**
 * @param {Given} given
 * @param {typeof readGguf | typeof readOnnxAdapter | undefined} read of its format; undefined for safetensors
 * @returns {Promise<Adapter>}
 */
async function readAdapter(given, read) {
  const { name, folder, input } = given;
  const ofFolder = /^(adapter_model|adapters|pytorch_lora_weights)\.safetensors$/.test(name);
  const id = (ofFolder && folder) || name.replace(/\.\w+$/, "");
  const files = { id, file: name, tensors: input, task: await given.sibling("task.json") };
  if (read) return read(files);
  const config = await given.sibling("adapter_config.json");
  if (config !== undefined) return (name === "adapters.safetensors" ? readMlx : readPeft)({ ...files, config });
  if (name === "adapter_model.safetensors") throw new Error(`${name}: give adapter_config.json with it, both at once`);
  try {
    return await readDiffusers(files);
  } catch (error) {
    if (/** @type {{ tag?: string }} */ (error).tag !== "adapter") throw error;
    return readKohya(files).catch((other) => {
      throw new Error(`as of diffusers: ${/** @type {Error} */ (error).message}; as of kohya: ${other.message}`);
    });
  }
}

/**
 * Sorts files into those to open and the JSON of their folders.
 * @param {readonly { file: File, folder: string }[]} files
 * @returns {Given[]}
 */
export function givenFiles(files) {
  const opened = files.filter(({ file }) => !file.name.endsWith(".json"));
  return opened.map(({ file, folder }) => ({
    name: file.name,
    folder,
    input: file,
    sibling: async (name) => {
      const found = files.find((one) => one.folder === folder && one.file.name === name);
      return found && parse(name, await found.file.text());
    },
  }));
}

/**
 * @param {string} address relative ones are against the page
 * @returns {Given}
 * @throws TypeError for what is no address
 */
export function givenAddress(address) {
  const hub = /^hf:/i.test(address);
  const url = hub ? address : new URL(address, location.href).href;
  const path = hub ? address : decodeURIComponent(new URL(url).pathname);
  const [folder = "", name = ""] = path.split("/").slice(-2);
  return {
    name,
    folder,
    input: url,
    sibling: async (other) => {
      const answer = hub ? undefined : await fetch(new URL(other, url)).catch(() => undefined);
      return answer?.ok ? parse(other, await answer.text()) : undefined;
    },
  };
}

/** @param {string} name @param {string} text @returns {unknown} */
function parse(name, text) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`${name}: is not JSON: ${/** @type {Error} */ (error).message}`);
  }
}

/**
 * Files that were dropped, and those in folders that were. Call it in the event: what is dropped is gone after it.
 * @param {DataTransfer} dropped
 * @returns {Promise<{ file: File, folder: string }[]>}
 */
export async function droppedFiles(dropped) {
  const found = Array.from(dropped.items, (item) => {
    const entry = item.webkitGetAsEntry();
    const file = item.getAsFile();
    if (!entry || !file) return [];
    if (entry.isFile) return [{ file, folder: "" }];
    // Chromium reads no files of entries in a page that comes from a disk; Firefox has no handles.
    const handle = "getAsFileSystemHandle" in item && /** @type {any} */ (item).getAsFileSystemHandle();
    const inside = handle ? filesOfHandle(handle) : filesOfEntry(/** @type {FileSystemDirectoryEntry} */ (entry));
    return inside.then((files) => files.map((file) => ({ file, folder: entry.name })));
  });
  return (await Promise.all(found)).flat();
}

/** @param {Promise<any>} folder a FileSystemDirectoryHandle @returns {Promise<File[]>} */
async function filesOfHandle(folder) {
  const files = [];
  for await (const one of (await folder).values()) if (one.kind === "file") files.push(await one.getFile());
  return files;
}

/** @param {FileSystemDirectoryEntry} folder @returns {Promise<File[]>} */
async function filesOfEntry(folder) {
  const reader = folder.createReader();
  /** @type {FileSystemEntry[]} */
  const inside = [];
  for (;;) {
    // A browser gives a hundred at a time.
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (some.length === 0) break;
    inside.push(...some);
  }
  const files = /** @type {FileSystemFileEntry[]} */ (inside.filter((one) => one.isFile));
  return Promise.all(files.map((one) => new Promise((resolve, reject) => one.file(resolve, reject))));
}
