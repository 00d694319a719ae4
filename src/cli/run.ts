/**
 * What a command opens while it runs: all is closed when it ends, however it ends.
 */
import type { Adapter } from "../adapters/adapter.ts";
import { readAdapters } from "../adapters/folder.ts";
import { openHost } from "../base/open.ts";
import { renamedHost } from "../base/renamed.ts";
import type { BuildOptions } from "../pack/build.ts";
import { type OpenOptions, openPack, type Pack } from "../pack/pack.ts";
import { takeLock } from "./lock.ts";
import type { Output } from "./output.ts";

interface Closable {
  close?(): unknown;
}

export class Run {
  readonly #opened: Closable[] = [];
  readonly #out: Output;

  constructor(out: Output) {
    this.#out = out;
  }

  /** Closes `thing` when the command ends; what was opened last goes first. */
  closing<T extends Closable>(thing: T): T {
    this.#opened.unshift(thing);
    return thing;
  }

  /**
   * Keeps other writers from a file until the command ends. What is to be changed is read after that.
   * @throws SourceError naming who holds it for too long
   */
  async lock(path: string): Promise<void> {
    this.closing(await takeLock(path, this.#out.warn));
  }

  /** Refuses a file that could not be locked for writing now: before the work, which may take hours, and not after it. */
  async writable(path: string): Promise<void> {
    (await takeLock(path, this.#out.warn)).close();
  }

  async pack(path: string, options?: OpenOptions): Promise<Pack> {
    return this.closing(await openPack(path, options));
  }

  /** @param rename new ids, by old id or by path */
  async adapters(paths: readonly string[], rename: ReadonlyMap<string, string>): Promise<Adapter[]> {
    const adapters = await readAdapters(paths, { rename }).catch((error: Error) => {
      // The library speaks of its own option.
      error.message = error.message.replace("with rename", "with --as");
      throw error;
    });
    return adapters.map((adapter) => this.closing(adapter));
  }

  /**
   * The base model, where one was named.
   * @param names its names of weights, by module name
   */
  async base(path: string | undefined, names: ReadonlyMap<string, string>): Promise<Pick<BuildOptions, "base">> {
    if (path === undefined) return {};
    const host = this.closing(await openHost(path));
    return { base: names.size > 0 ? renamedHost(host, names) : host };
  }

  async close(): Promise<void> {
    for (const thing of this.#opened) await thing.close?.();
  }
}
