/**
 * A command: its declaration, and a `Run` of it, which knows what it reads, writes and locks. All that was opened is
 * closed when the command ends, however it ends. Names of the Hugging Face Hub become paths here: no command knows of
 * it.
 */

import { existsSync } from "node:fs";
import { readdir } from "node:fs/promises";
import { dirname, join, posix } from "node:path";
import type { Adapter } from "../adapters/adapter.ts";
import { type OpenOptions, openPack, type Pack } from "../core/pack.ts";
import { FormatError, listed, SourceError } from "../errors.ts";
import { type FileKind, kindOfSource } from "../format/kind.ts";
import type { HubOptions } from "../http/hub.ts";
import { hubName, hubText } from "../http/hub-page.ts";
import { openSource } from "../open-source.ts";
import type { BuildOptions } from "../pack/recipe.ts";
import type { OnProgress } from "../progress.ts";
import { sum } from "../tensor/dtypes.ts";
import { type Command, Option } from "./commander.ts";
import { type Chunks, checkTarget, onInterrupt, stat, type TargetOptions, takeLock, writeWhole } from "./files.ts";
import { flagOf, inFlags, type OptionSpec, type Options, type ReadAs, UsageError, type Values } from "./options.ts";
import type { Output } from "./output.ts";

export interface Result {
  /** Printed by `--json`; the keys are a contract. */
  readonly json: Readonly<Record<string, unknown>>;
  readonly text: readonly string[];
  /** 1 when the command ran but its verdict is bad. Default: 0, or 130 after a Ctrl-C. */
  readonly exitCode?: number;
  /** The command goes on after it has printed, until this is settled. */
  readonly until?: Promise<unknown>;
}

/** The exit code after a Ctrl-C, as shells have it: 128 and the number of the signal. */
const INTERRUPTED = 130;
/** The exit code where `--minutes` left tasks without a turn. */
export const OUT_OF_TIME = 3;

interface Declaration<A extends readonly string[], O extends Options> {
  /** Name and arguments, as `add <PACK> <ADAPTER...>`. */
  readonly usage: string;
  /** More than the line in the list of commands says. */
  readonly details?: string;
  /** A call of it, without "eigenlora". */
  readonly example: string;
  readonly options: O;
  /** Purpose of each argument that names a file; the last holds for all that follow. */
  readonly reads?: readonly (ReadAs | undefined)[];
  run(args: A, options: Values<O>, run: Run, out: Output): Promise<Result>;
}

/**
 * Adds a command to the program.
 * @param does its line in the list of commands
 * @param done gets the result once all is closed, or an exit code where an error is still to come
 */
export type Attach = (program: Command, does: string, out: Output, done: (result: Result | number) => void) => void;

/** @throws UsageError from the command for options that are missing, wrong, or do not go together */
export function command<A extends readonly string[], O extends Options>(declared: Declaration<A, O>): Attach {
  const { usage, details = "", example, options, reads = [] } = declared;
  return (program, does, out, done) => {
    const parser = program.command(usage).summary(does).description(`${does} ${details}`);
    for (const [name, spec] of Object.entries(options)) parser.addOption(toOption(flagOf(name), spec));
    parser.addHelpText("after", () => {
      const rare = parser.options.filter(({ hidden }) => hidden).length;
      const more = rare > 0 ? [`\n${rare} more options: --help --all`] : [];
      return [...more, `\nExample:\n  eigenlora ${example}`].join("\n");
    });
    parser.option("--json", "Print one JSON object.").action(async () => {
      const given: Readonly<Record<string, unknown>> = parser.opts();
      const run = new Run(out, given);
      let result: Result;
      try {
        const args: string[] = [];
        for (const [i, word] of parser.args.entries())
          args.push(await taken(word, reads[Math.min(i, reads.length - 1)], run));
        const values = await valuesOf(options, given, run);
        // The parser has counted the arguments.
        result = await declared.run(args as string[] & A, values, run, out);
        if (result.until) {
          done(result);
          await result.until;
          return;
        }
      } catch (error) {
        if (run.interrupted) done(INTERRUPTED);
        if (error instanceof Error) error.message = inFlags(error.message, options) + hintOf(error, run);
        throw error;
      } finally {
        await run.close();
      }
      done(run.interrupted ? { ...result, exitCode: INTERRUPTED } : result);
    });
  };
}

const flagsOf = (names: readonly string[]): string => names.map(flagOf).join(" or ");

function toOption(flag: string, spec: OptionSpec<unknown>): Option {
  const { value, short = "", help, needs, group, rare, parse } = spec;
  const otherwise = ["string", "number"].includes(typeof spec.default) ? ` Default: ${spec.default}.` : "";
  const option = new Option(
    `${short}${flag}${value ? ` <${value}>` : ""}`,
    `${help}${otherwise}${needs ? ` Needs ${flagsOf(needs)}.` : ""}`,
  );
  // Otherwise `--no-open` would switch `--open` off.
  option.negate = false;
  if (rare) option.hideHelp();
  if (group) option.helpGroup(group);
  if (!value) return option;
  return option.argParser((word: string, before: unknown) => {
    // Otherwise `--model --text lines.txt` would take the next option for a file.
    if (word.startsWith("--")) throw new UsageError(`${flag} needs a value, got the option ${word}`);
    return parse(word, flag, before);
  });
}

async function valuesOf<O extends Options>(
  options: O,
  given: Readonly<Record<string, unknown>>,
  run: Run,
): Promise<Values<O>> {
  const isGiven = (name: string): boolean => given[name] !== undefined;
  for (const [name, { required }] of Object.entries(options))
    if (required && !isGiven(name)) throw new UsageError(`missing ${flagOf(name)}`);
  for (const [name, { needs, excludes = {} }] of Object.entries(options)) {
    if (!isGiven(name)) continue;
    const [other] = Object.keys(excludes).filter(isGiven);
    if (other !== undefined) {
      const why = excludes[other] === "" ? "" : `: ${excludes[other]}`;
      throw new UsageError(`${flagOf(name)} and ${flagOf(other)} exclude each other${why}`);
    }
    if (needs && !needs.some(isGiven)) throw new UsageError(`${flagOf(name)} needs ${flagsOf(needs)}`);
  }
  const values: [string, unknown][] = [];
  // One after the other, so that progress and errors are of one file.
  for (const [name, spec] of Object.entries(options)) {
    const value = given[name] ?? spec.default;
    values.push([name, Array.isArray(value) ? [] : await taken(value, spec.reads, run)]);
    if (Array.isArray(value))
      for (const word of value) (values.at(-1)![1] as unknown[]).push(await taken(word, spec.reads, run));
  }
  return Object.fromEntries(values) as Values<O>;
}

async function taken<T>(value: T, reads: ReadAs | undefined, run: Run): Promise<T> {
  return typeof value === "string" && reads ? ((await run.take(value, reads)) as T) : value;
}

function hintOf(error: Error, { guessed }: Run): string {
  const name = guessed.find((name) => error instanceof SourceError && error.message.includes(name.replace(/@.*/, "")));
  return name === undefined
    ? ""
    : `. There is no file or folder ${name} here, so it was taken for a repository of the Hugging Face Hub`;
}

interface Closable {
  close?(): unknown;
}

/** A file that a command writes, whose lock it holds. */
export interface Target {
  /** @throws UsageError when it is one of these, which the command turned out to read */
  refuse(inputs: readonly string[]): void;
  /** @returns the size in bytes */
  write(chunks: Chunks): Promise<number>;
}

export class Run {
  /** Hashes of tasks that no pack may give. */
  readonly revoked: readonly string[];
  readonly #maxExpansion: number | undefined;
  /** Names that were taken for those of repositories on the Hub, since nothing on the disk has them. */
  readonly guessed: string[] = [];
  readonly #opened: Closable[] = [];
  /** Names as they are shown, by the paths that they became. */
  readonly #shown = new Map<string, string>();
  /** True after a Ctrl-C. */
  interrupted = false;
  readonly #out: Output;

  constructor(out: Output, { revoked = [], maxExpansion }: Pick<OpenOptions, "revoked" | "maxExpansion"> = {}) {
    this.revoked = revoked;
    this.#maxExpansion = maxExpansion;
    this.#out = out;
  }

  /**
   * The path that a name of the command line stands for, once what it needs is downloaded; or a name that the library
   * takes.
   * @throws TypeError for a name of the Hub that is not well formed, SourceError for a model that cannot be had
   */
  async take(given: string, reads: ReadAs): Promise<string> {
    const short = (reads === "repository" || reads === "model") && isShort(given);
    const name = hubName(short ? `hf:${given}` : given);
    if (!name) {
      const ending = ENDINGS[reads];
      const path = ending !== undefined && stat(given)?.isDirectory() ? await fileIn(given, ending) : given;
      if (reads === "model") await this.#refuse(path, (kind) => kind !== "an ONNX model", "an ONNX model");
      return path;
    }
    if (reads === "own")
      throw new UsageError(`${given} lies on the Hugging Face Hub, and the file is to be changed: download it first`);
    if (short) this.guessed.push(given);
    if (reads !== "model") return hubText(name);
    const { openSnapshot } = await import("../http/hub.ts");
    const snapshot = await openSnapshot(name, { onProgress: downloading(this.#out) });
    const { files } = snapshot;
    let model = name.path;
    if (!model.endsWith(".onnx") && !files.has(model)) {
      const inside = [...files.keys()].filter((file) => model === "" || file.startsWith(`${model}/`));
      const models = inside.filter((file) => file.endsWith(".onnx"));
      model = onlyOne(models, ".onnx", snapshot.nameOf(model));
    }
    const [path] = await snapshot.get([model]);
    const folder = posix.dirname(model);
    const weights = (await weightFiles(path!)).map((location) => posix.join(folder, location));
    const home = [folder, posix.dirname(folder)].find((place) => files.has(posix.join(place, TOKENIZER[0]!)));
    const tokenizer = home === undefined ? [] : TOKENIZER.map((file) => posix.join(home, file));
    // A missing file gets a better message when it is read.
    await snapshot.get([...weights, ...tokenizer].filter((file) => files.has(file)));
    this.#shown.set(path!, hubText({ ...name, path: model }));
    return path!;
  }

  /** A path as people know it. */
  shown(path: string): string {
    return this.#shown.get(path) ?? path;
  }

  /** Closes `thing` when the command ends, the latest first. */
  closing<T extends Closable>(thing: T): T {
    this.#opened.unshift(thing);
    return thing;
  }

  /**
   * Keeps other writers from a file until the command ends. Read it after that, if it is to be changed.
   * @throws SourceError naming the process that holds it for too long
   */
  async lock(path: string): Promise<void> {
    this.closing(await takeLock(path, this.#out.warn));
  }

  /**
   * A file that the command will write: refused, or locked, before the work.
   * @throws UsageError when it may not be written, SourceError when it cannot be
   */
  async target(path: string, options: TargetOptions): Promise<Target> {
    checkTarget(path, options);
    await this.lock(path);
    return {
      refuse: (inputs) => checkTarget(path, { ...options, inputs }),
      write: (chunks) => writeWhole(path, chunks, options.force),
    };
  }

  /** Aborted by the first Ctrl-C; a second ends the process. */
  interrupts(): AbortSignal {
    const controller = new AbortController();
    const first = (): void => {
      this.interrupted = true;
      controller.abort();
    };
    this.closing({ close: onInterrupt(first) });
    return controller.signal;
  }

  /** @throws FormatError for a file of another kind than `expected`: swapped arguments, found before the work */
  async #refuse(path: string, isWrong: (kind: FileKind) => boolean, expected: string): Promise<void> {
    const kind = stat(path)?.isFile() ? await this.kindOf(path) : undefined;
    if (kind !== undefined && isWrong(kind))
      throw new FormatError(`this is ${kind}, expected ${expected}`, { file: path, part: "first bytes" });
  }

  /** The kind of a file, by its first bytes; undefined for what is no file, or of no known kind. */
  async kindOf(path: string): Promise<FileKind | undefined> {
    const source = await openSource(path).catch(() => undefined);
    const kind = source && (await kindOfSource(source));
    // A command line may name more files than a process may hold open.
    await source?.close?.();
    return kind;
  }

  /** Tells a task file by its name, since a damaged one is to be refused as one, or by its first bytes. */
  async isTaskFile(path: string): Promise<boolean> {
    if (path.endsWith(".eigentask")) return true;
    return stat(path)?.isFile() === true && (await this.kindOf(path)) === "an EigenLoRA task file";
  }

  async pack(path: string, options: OpenOptions = {}): Promise<Pack> {
    const { revoked } = this;
    const given = { ...options, maxExpansion: this.#maxExpansion };
    return this.closing(await openPack(path, revoked.length > 0 ? { ...given, revoked } : given));
  }

  /**
   * @param rename new ids, by old id or by path
   * @param base model that formats need for what they leave out
   */
  async adapters(
    paths: readonly string[],
    rename: ReadonlyMap<string, string>,
    base: string | undefined,
  ): Promise<Adapter[]> {
    for (const path of paths) await this.#refuse(path, (kind) => kind.startsWith("an EigenLoRA "), "an adapter");
    const { readAdapters } = await import("../adapters/folder.ts");
    const adapters = await readAdapters(paths, { rename, base, onProgress: downloading(this.#out) });
    return adapters.map((adapter) => this.closing(adapter));
  }

  /** The base model's weights, where a file of them was named. @param names its names of weights, by module name */
  async base(path: string | undefined, names: ReadonlyMap<string, string>): Promise<Pick<BuildOptions, "base">> {
    if (path === undefined) return {};
    const how: HubOptions = { onProgress: downloading(this.#out) };
    const { describeBase, openWeights } = await import("../adapters/tree.ts");
    const host = await openWeights(path, how);
    if (host === undefined) {
      // Other files name its parts, and give no weights to take fingerprints of.
      await describeBase(path, how);
      const advice = "give model.safetensors, or a folder with it, so that apps know the right model";
      this.#out.warn(
        `--base ${this.shown(path)}: has no weights in safetensors, so no fingerprints are stored: ${advice}`,
      );
      return {};
    }
    this.closing(host);
    const { renamedHost } = await import("../pack/build.ts");
    return { base: names.size > 0 ? renamedHost(host, names) : host };
  }

  async close(): Promise<void> {
    for (const thing of this.#opened) await thing.close?.();
  }
}

const ENDINGS: Partial<Record<ReadAs, string>> = { model: ".onnx", weights: ".safetensors" };
/** An ending of letters, which files have, and repositories seldom. */
const FILE = /\.[a-z_]{3,}$/;
const TOKENIZER = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"];

/** `org/name`, where a path is not meant: neither that nor a folder `org` is here. */
function isShort(given: string): boolean {
  if (!/^\w[\w.-]*\/\w[\w.-]*(@[^/]+)?$/.test(given) || FILE.test(given)) return false;
  return !existsSync(given) && !existsSync(dirname(given));
}

/**
 * The only file with an ending in a folder, or in its folder onnx, where exporters put it.
 * @throws SourceError unless there is one
 */
async function fileIn(folder: string, ending: string): Promise<string> {
  for (const place of [folder, join(folder, "onnx")]) {
    const names = await readdir(place).catch((): string[] => []);
    const files = names.filter((name) => name.endsWith(ending)).sort();
    const paths = files.map((name) => join(place, name));
    if (files.length > 0) return onlyOne(paths, ending, folder);
  }
  return onlyOne([], ending, folder);
}

const LISTED = 8;

/** @throws SourceError unless there is one file */
function onlyOne(files: readonly string[], ending: string, where: string): string {
  if (files.length === 1) return files[0]!;
  const onnx = ending === ".onnx";
  const none = onnx ? "no ONNX model; export one from it (docs/export.md)" : `no file *${ending}`;
  const several = `several ${onnx ? "models" : `files *${ending}`}; name one of ${listed(files, LISTED)}`;
  throw new SourceError(`holds ${files.length === 0 ? none : several}`, { file: where });
}

/** Locations of the files that hold weights of a model, relative to its folder. */
export async function weightFiles(model: string): Promise<string[]> {
  const { readModel } = await import("../onnx/read.ts");
  const { externalFiles } = await import("../onnx/tensors.ts");
  const file = await readModel(model);
  await file.close();
  return [...externalFiles(file.model).keys()];
}

/** A listener that shows how much has arrived of all files that are downloaded together. */
export function downloading(out: Output): OnProgress {
  let files = new Map<string, { readonly loaded: number; readonly total: number }>();
  return ({ status, name, file, loaded, total }) => {
    // All are announced before the first arrives.
    if (status === "initiate" && [...files.values()].every((file) => file.loaded === file.total)) files = new Map();
    files.set(`${name}/${file}`, { loaded, total });
    if (status !== "progress") return;
    const all = [...files.values()];
    const stage = `downloading ${files.size === 1 ? file : `${files.size} files of ${name.replace(/@[0-9a-f]{40}/, "")}`}`;
    const done = sum(all.map((file) => file.loaded));
    out.progress({ stage, done, total: sum(all.map((file) => file.total)), unit: "bytes" });
  };
}
