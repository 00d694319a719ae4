/** PyPI's lorashare and vlora-dev on the same adapters. */
import { join } from "node:path";
import { withAdapters } from "../../lib/adapters.js";
import { startPython } from "../../lib/peers.js";
import { inScratch } from "../../lib/process.js";

/** @typedef {import("eigenlora/build").Adapter} Adapter */

/** PyPI's lorashare and vlora-dev, in a process that keeps running. */
export class Peers {
  /** @param {import("../../lib/peers.js").Running | undefined} child @param {string | undefined} reason */
  constructor(child, reason) {
    this.child = child;
    /** Reason why they do not run. */
    this.reason = reason;
    /** @type {Record<"lorashare" | "vlora", string>} */
    this.versions = { lorashare: child?.first.lorashare, vlora: child?.first["vlora-dev"] };
  }

  static async start() {
    const child = await startPython("size.py");
    return "reason" in child
      ? new Peers(undefined, "pip install lorashare==0.1.3 vlora-dev==1.0.0")
      : new Peers(child, undefined);
  }

  /**
   * @template T
   * @param {readonly Adapter[]} adapters
   * @param {import("./ways.js").Peer} way
   * @param {(bytes: number, back: Adapter[]) => Promise<T>} work adapters as the peer gives them back, in the same order
   */
  async compress(adapters, { kind, k, packed = false }, work) {
    if (!this.child) throw new Error(this.reason);
    const { ask } = this.child;
    return inScratch(async (scratch) => {
      const out = join(scratch, kind);
      const { bytes } = await ask({ package: kind, k, packed, adapters: adapters.map(({ file }) => file), out });
      const folders = adapters.map(({ id }) => join(out, "back", id));
      return withAdapters(folders, (back) => work(bytes, back));
    });
  }

  stop() {
    this.child?.stop();
  }
}
