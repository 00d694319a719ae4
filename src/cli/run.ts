/**
 * What a command opens while it runs: all is closed when it ends, however it ends.
 */
import type { Adapter } from "../adapters/adapter.ts";
import { openWeights } from "../adapters/base-files.ts";
import { describeBase } from "../adapters/describe-base.ts";
import { readAdapters } from "../adapters/folder.ts";
import { type OpenOptions, openPack } from "../core/open-pack.ts";
import type { Pack } from "../core/pack.ts";
import { renamedHost } from "../core/renamed.ts";
import { readTaskFile } from "../core/task-file.ts";
import type { TaskFile } from "../format/format.ts";
import { type FileKind, kindOfSource } from "../format/kind.ts";
import type { HubOptions } from "../http/hub.ts";
import { openSource } from "../open-source.ts";
import type { BuildOptions } from "../pack/recipe.ts";
import { makeFolder, writeWhole } from "./files.ts";
import { takeLock } from "./lock.ts";
import { downloading, named } from "./on-hub.ts";
import type { ReadAs } from "./options.ts";
import type { Output } from "./output.ts";
import { checkTarget, type TargetOptions } from "./target.ts";
import { onInterrupt, undoOnExit } from "./undo.ts";

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
