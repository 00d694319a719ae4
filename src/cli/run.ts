/**
 * What a command opens while it runs: all is closed when it ends, however it ends.
 */

import { existsSync } from "node:fs";
import { readdir } from "node:fs/promises";
import { dirname, join, posix } from "node:path";
import type { Adapter } from "../adapters/adapter.ts";
import { readAdapters } from "../adapters/folder.ts";
import { describeBase, kind, openWeights } from "../adapters/tree.ts";
import { renamedHost } from "../core/open-base.ts";
import { type OpenOptions, openPack } from "../core/open-pack.ts";
import type { Pack } from "../core/pack.ts";
import { readTaskFile } from "../core/task-file.ts";
import { SourceError } from "../errors.ts";
import type { TaskFile } from "../format/format.ts";
import { type FileKind, kindOfSource } from "../format/kind.ts";
import { type HubOptions, openSnapshot, type Snapshot } from "../http/hub.ts";
import { type HubName, hubName, hubText } from "../http/hub-name.ts";
import { readModel } from "../onnx/read.ts";
import { externalFiles } from "../onnx/tensors.ts";
import { openSource } from "../open-source.ts";
import type { BuildOptions } from "../pack/recipe.ts";
import type { OnProgress } from "../progress.ts";
import { makeFolder, writeWhole } from "./files.ts";
import { onInterrupt, takeLock, undoOnExit } from "./lock.ts";
import { type ReadAs, UsageError } from "./options.ts";
import { bytes, type Output, sum } from "./output.ts";
import { checkTarget, type TargetOptions } from "./target.ts";

interface Closable {
  close?(): unknown;
}

/** A file that a command writes. */
export interface Target {
  /** @throws UsageError when it is one of these, which the command turned out to read */
  refuse(inputs: readonly string[]): void;
  /** Takes the lock and writes the file. @returns its size in bytes */
  write(chunks: Iterable<Uint8Array> | AsyncIterable<Uint8Array>): Promise<number>;
}

export class Run {
  /** Hashes of tasks that no pack may give. */
  readonly revoked: readonly string[];
  readonly #maxExpansion: number | undefined;
  /** Names that were taken for those of repositories on the Hub, since nothing on the disk is called so. */
  readonly guessed: string[] = [];
  readonly #opened: Closable[] = [];
  /** Names as they are shown, by the paths that they became. */
  readonly #shown = new Map<string, string>();
  #failed = false;
  #interrupted = false;
  readonly #out: Output;

  constructor(out: Output, { revoked = [], maxExpansion }: Pick<OpenOptions, "revoked" | "maxExpansion"> = {}) {
    this.revoked = revoked;
    this.#maxExpansion = maxExpansion;
    this.#out = out;
  }

  /** What a name of the command line becomes: a path, or a name that the library takes. */
  async take(given: string, reads: ReadAs): Promise<string> {
    const { path, shown, guessed } = await named(given, reads, this.#out);
    this.#shown.set(path, shown);
    if (guessed) this.guessed.push(given);
    return path;
  }

  /** How people know a path. */
  shown(path: string): string {
    return this.#shown.get(path) ?? path;
  }

  /** Closes `thing` when the command ends; what was opened last goes first. */
  closing<T extends Closable>(thing: T): T {
    this.#opened.unshift(thing);
    return thing;
  }

  /**
   * Calls `step` when the command fails or is stopped, once all that it began since is undone.
   * @param step synchronous
   */
  undoing(step: () => void): void {
    const forget = undoOnExit(step);
    this.closing({
      close: () => {
        if (this.#failed) step();
        forget();
      },
    });
  }

  /**
   * Makes a folder, and those that it lies in. Those that it made go again when the command fails, unless something is in them by then.
   * @throws SourceError when there cannot be one
   */
  folder(path: string): void {
    this.undoing(makeFolder(path));
  }

  /**
   * Keeps other writers from a file until the command ends. What is to be changed is read after that.
   * @throws SourceError naming who holds it for too long
   */
  async lock(path: string): Promise<void> {
    this.closing(await takeLock(path, this.#out.warn));
  }

  /**
   * A file that the command will write: refused before the work, which may take hours, and not after it.
   * @throws UsageError when it may not be written, SourceError when it cannot be
   */
  async target(path: string, options: TargetOptions): Promise<Target> {
    checkTarget(path, options);
    (await takeLock(path, this.#out.warn)).close();
    return {
      refuse: (inputs) => checkTarget(path, { ...options, inputs }),
      write: async (chunks) => {
        await this.lock(path);
        return writeWhole(path, chunks, options.force);
      },
    };
  }

  /** Aborted by the first Ctrl-C; a second ends the process. */
  interrupts(): AbortSignal {
    const controller = new AbortController();
    const first = (): void => {
      this.#interrupted = true;
      controller.abort();
    };
    this.closing({ close: onInterrupt(first) });
    return controller.signal;
  }

  /** Whether there was a Ctrl-C. */
  get interrupted(): boolean {
    return this.#interrupted;
  }

  /** What a file is, by how it begins; undefined for what is no file, or of no known kind. */
  async kindOf(path: string): Promise<FileKind | undefined> {
    const source = await openSource(path).catch(() => undefined);
    return source && kindOfSource(this.closing(source));
  }

  /** @throws FormatError when it is damaged, or another kind of file */
  async taskFile(path: string): Promise<TaskFile> {
    return readTaskFile(path);
  }

  async pack(path: string, options: OpenOptions = {}): Promise<Pack> {
    const { revoked } = this;
    const given = { ...options, maxExpansion: this.#maxExpansion };
    return this.closing(await openPack(path, revoked.length > 0 ? { ...given, revoked } : given));
  }

  /**
   * @param rename new ids, by old id or by path
   * @param base what formats leave to the base model is read from it
   */
  async adapters(
    paths: readonly string[],
    rename: ReadonlyMap<string, string>,
    base: string | undefined,
  ): Promise<Adapter[]> {
    const adapters = await readAdapters(paths, { rename, base, onProgress: downloading(this.#out) });
    return adapters.map((adapter) => this.closing(adapter));
  }

  /**
   * The base model's weights, where a file of them was named.
   * @param names its names of weights, by module name
   */
  async base(path: string | undefined, names: ReadonlyMap<string, string>): Promise<Pick<BuildOptions, "base">> {
    if (path === undefined) return {};
    const how: HubOptions = { onProgress: downloading(this.#out) };
    const host = await openWeights(path, how);
    if (host === undefined) {
      // These say what its parts are called, and give no weights to take fingerprints of.
      await describeBase(path, how);
      const advice = "give model.safetensors, or a folder with it, so that apps know the right model";
      this.#out.warn(
        `--base ${this.shown(path)}: has no weights in safetensors, so no fingerprints are stored: ${advice}`,
      );
      return {};
    }
    this.closing(host);
    return { base: names.size > 0 ? renamedHost(host, names) : host };
  }

  /** Says that the command has failed, before `close`. */
  fail(): void {
    this.#failed = true;
  }

  async close(): Promise<void> {
    for (const thing of this.#opened) await thing.close?.();
  }
}

// What commands read may lie on the Hugging Face Hub, or be a folder with the file in it: names become paths here, once what they need is
// downloaded, or names that the library takes. No command knows of it.

/** A name as the command gets it, and as it is shown to people. */
interface Named {
  readonly path: string;
  readonly shown: string;
  /** Whether it was taken for a name of the Hub since nothing on the disk is called so. */
  readonly guessed: boolean;
}

/** @throws TypeError for a name of the Hub that is not well formed, SourceError for a model that cannot be had */
async function named(given: string, reads: ReadAs, out: Output): Promise<Named> {
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
