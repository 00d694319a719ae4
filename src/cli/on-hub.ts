/**
 * What commands read may lie on the Hugging Face Hub, or be a folder with the file in it: names become paths here, once what they need is
 * downloaded, or names that the library takes. No command knows of it.
 */
import { existsSync } from "node:fs";
import { readdir } from "node:fs/promises";
import { dirname, join, posix } from "node:path";
import { kind } from "../adapters/tree.ts";
import { SourceError } from "../errors.ts";
import { openSnapshot, type Snapshot } from "../http/hub.ts";
import { type HubName, hubName, hubText } from "../http/hub-name.ts";
import { readModel } from "../onnx/read.ts";
import { externalFiles } from "../onnx/tensors.ts";
import type { OnProgress } from "../progress.ts";
import { type ReadAs, UsageError } from "./options.ts";
import { bytes, type Output, sum } from "./output.ts";

/** A name as the command gets it, and as it is shown to people. */
export interface Named {
  readonly path: string;
  readonly shown: string;
  /** Whether it was taken for a name of the Hub since nothing on the disk is called so. */
  readonly guessed: boolean;
}

/** @throws TypeError for a name of the Hub that is not well formed, SourceError for a model that cannot be had */
export async function named(given: string, reads: ReadAs, out: Output): Promise<Named> {
  const short = (reads === "repository" || reads === "model") && isShort(given);
  const name = hubName(short ? `hf:${given}` : given);
  if (!name) {
    const path = ENDING.has(reads) && (await kind(given)) === "folder" ? await fileIn(given, reads) : given;
    return { path, shown: path, guessed: false };
  }
  if (reads === "own")
    throw new UsageError(`${given} lies on the Hugging Face Hub, and the file is to be changed: download it first`);
  if (reads !== "model") return { path: hubText(name), shown: hubText(name), guessed: short };
  const snapshot = await openSnapshot(name, { onProgress: downloading(out), stage: "model" });
  const model = modelIn(snapshot, name);
  return { path: await download(snapshot, model), shown: hubText({ ...name, path: model }), guessed: short };
}

/** What a folder is searched for that stands for a file. */
const ENDING: ReadonlyMap<ReadAs, string> = new Map([
  ["model", ".onnx"],
  ["weights", ".safetensors"],
]);

/** The model in a folder of the disk, or in its folder onnx, where exporters put it. @throws SourceError when there is none, or several */
async function fileIn(folder: string, reads: ReadAs): Promise<string> {
  const ending = ENDING.get(reads)!;
  for (const place of [folder, join(folder, "onnx")]) {
    const names = await readdir(place).catch((): string[] => []);
    const files = names.filter((name) => name.endsWith(ending)).sort();
    if (files.length > 0)
      return onlyOne(
        files.map((name) => join(place, name)),
        ending,
        folder,
      );
  }
  return onlyOne([], ending, folder);
}

/** Files of a kind that a message lists. */
const LISTED = 8;

/** @throws SourceError unless there is one file */
function onlyOne(files: readonly string[], ending: string, where: string, sizeOf?: (file: string) => string): string {
  if (files.length === 1) return files[0]!;
  const more = files.length > LISTED ? ` and ${files.length - LISTED} more` : "";
  const [none, all] =
    ending === ".onnx"
      ? ["no ONNX model; export one from it (docs/export.md)", "models"]
      : [`no file *${ending}`, `files *${ending}`];
  const several = `several ${all}; name one of ${files
    .slice(0, LISTED)
    .map(sizeOf ?? String)
    .join(", ")}${more}`;
  throw new SourceError(`holds ${files.length === 0 ? none : several}`, { file: where });
}

/** A listener that shows how much has arrived of all files that are downloaded together. */
export function downloading(out: Output): OnProgress {
  let files = new Map<string, { readonly loaded: number; readonly total: number }>();
  return ({ status, name, file, loaded, total }) => {
    const all = [...files.values()];
    // All of them are told of before the first arrives.
    if (status === "initiate" && all.every((one) => one.loaded === one.total)) files = new Map();
    files.set(`${name}/${file}`, { loaded, total });
    if (status !== "progress") return;
    const what = files.size === 1 ? file : `${files.size} files of ${name.replace(/@[0-9a-f]{40}/, "")}`;
    const [done, whole] = (["loaded", "total"] as const).map((key) => sum([...files.values()].map((one) => one[key])));
    out.progress({ stage: `downloading ${what}`, done: done!, total: whole!, unit: "bytes" });
  };
}

/** Endings that files have, and repositories seldom. */
const FILE = /\.(onnx|onnx_adapter|safetensors|gguf|json|eigen|eigentask|bin)$/;

/** `org/name`, where a path is not meant: neither that nor a folder `org` is here. */
function isShort(given: string): boolean {
  if (!/^\w[\w.-]*\/\w[\w.-]*(@[^/]+)?$/.test(given) || FILE.test(given)) return false;
  return !existsSync(given) && !existsSync(dirname(given));
}

/** The model that a name stands for. @throws SourceError when there is none, or several */
function modelIn(snapshot: Snapshot, { path }: HubName): string {
  if (path.endsWith(".onnx") || snapshot.files.has(path)) return path;
  const inside = [...snapshot.files.keys()].filter((file) => path === "" || file.startsWith(`${path}/`));
  const models = inside.filter((file) => file.endsWith(".onnx"));
  const sized = (file: string): string => {
    const found = snapshot.files.get(file)?.size;
    return found === undefined ? file : `${file} (${bytes(found)})`;
  };
  return onlyOne(models, ".onnx", snapshot.nameOf(path), sized);
}

/** What a tokenizer consists of. */
const TOKENIZER = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"];

/** Downloads a model, the files that hold its weights, and its tokenizer, beside it or one folder above. @returns its path */
async function download(snapshot: Snapshot, model: string): Promise<string> {
  const [path] = await snapshot.get([model]);
  const folder = posix.dirname(model);
  const file = await readModel(path!);
  await file.close();
  const weights = [...externalFiles(file.model.graph.proto).keys()].map((location) => posix.join(folder, location));
  const places = [folder, posix.dirname(folder)];
  const home = places.find((place) => snapshot.files.has(posix.join(place, TOKENIZER[0]!)));
  const tokenizer = home === undefined ? [] : TOKENIZER.map((name) => posix.join(home, name));
  // What is missing is missed in better words when it is read.
  await snapshot.get([...weights, ...tokenizer].filter((one) => snapshot.files.has(one)));
  return path!;
}
