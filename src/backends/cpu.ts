/**
 * What backends of the CPU share: blocks by owner, and bytes that are moved when an operation is called. Where a block lies
 * and what computes are the subclass's.
 */
import type { Backend, Block, ExpandJob, FoldJob, Owner, ProjectJob, ScaleJob, Slice } from "./backend.ts";
import { checkApart, checkSlice } from "./checks.ts";

/** A backend whose blocks each have a `Place` in the CPU's memory. */
export abstract class CpuBackend<Place> implements Backend {
  abstract readonly name: "js" | "wasm";
  abstract readonly variant: string;
  readonly #blocks = new Map<Block, { readonly place: Place; readonly owner: Owner }>();

  abstract expand(job: ExpandJob): void;
  abstract project(job: ProjectJob): void;
  abstract fold(job: FoldJob): void;
  abstract scale(job: ScaleJob): void;

  /** Zeroed bytes. @throws BackendError when there are none */
  protected abstract claim(byteLength: number, owner: Owner): Place;
  protected abstract release(place: Place, byteLength: number): void;
  protected abstract bytesAt(place: Place, byteOffset: number, byteLength: number): Uint8Array;
  /** Bytes held beyond those of blocks. */
  protected abstract beyond(blockBytes: number): number;

  allocate(byteLength: number, owner: Owner): Block {
    const place = this.claim(byteLength, owner);
    const block: Block = { byteLength };
    this.#blocks.set(block, { place, owner });
    return block;
  }

  free(block: Block): void {
    const held = this.#blocks.get(block);
    if (held && this.#blocks.delete(block)) this.release(held.place, block.byteLength);
  }

  /** @throws TypeError when the slice's block is not held */
  protected place(name: string, { block }: Slice): Place {
    const held = this.#blocks.get(block);
    if (held === undefined) throw new TypeError(`${name}.block is not held by this backend; was it freed?`);
    return held.place;
  }

  protected bytes(name: string, slice: Slice, byteLength: number): Uint8Array {
    const place = this.place(name, slice);
    checkSlice(name, slice, byteLength);
    return this.bytesAt(place, slice.byteOffset, byteLength);
  }

  upload(to: Slice, source: Uint8Array): void {
    this.bytes("to", to, source.byteLength).set(source);
  }

  copy(from: Slice, to: Slice, byteLength: number): void {
    const source = this.bytes("from", from, byteLength);
    const target = this.bytes("to", to, byteLength);
    checkApart("to", to, byteLength, "from", from, byteLength);
    target.set(source);
  }

  view(at: Slice, byteLength: number): Uint8Array {
    return this.bytes("at", at, byteLength);
  }

  finish(): void {}

  memory(): Record<Owner | "reserved", number> {
    const total = { basis: 0, coefficients: 0, pristine: 0, active: 0, scratch: 0, reserved: 0 };
    let sum = 0;
    for (const [{ byteLength }, { owner }] of this.#blocks) {
      total[owner] += byteLength;
      sum += byteLength;
    }
    return { ...total, reserved: this.beyond(sum) };
  }

  close(): void {
    for (const block of this.#blocks.keys()) this.free(block);
  }
}
