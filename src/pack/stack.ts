/** The stack of one module: what all adapters that adapt it hold of it. */
import type { Adapter } from "../adapters/adapter.ts";
import type { SharedModule } from "../adapters/modules.ts";
import type { ModuleStack } from "../extract/extract.ts";
import { letGo } from "../extract/garbage.ts";
import type { Term } from "../tensor/term.ts";

/** Adapters that are read at a time. */
const TOGETHER = 8;

/** Reads a module of its owners, in their order. @throws AdapterError for a value that is no number */
export async function readStack({
  shape,
  owners,
}: SharedModule<Adapter>): Promise<{ stack: ModuleStack; terms: readonly Term[] }> {
  const terms: Term[] = [];
  // Of each that is read there are several copies for a while.
  for (let at = 0; at < owners.length; at += TOGETHER)
    terms.push(
      ...(await Promise.all(owners.slice(at, at + TOGETHER).map(({ modules }) => modules.get(shape.name)!.read()))),
    );
  const members = terms.map((term, i) => ({ ...term, id: owners[i]!.id }));
  // Of each number the file's bytes, the decoded ones, those turned, and those sent to a thread.
  letGo(4 * 4 * members.reduce((sum, { A, Bt }) => sum + A.length + Bt.length, 0));
  return { stack: { ...shape, members }, terms };
}

/** What is read of a module at once where its owners need not meet. */
const PIECE_BYTES = 2 ** 21;

/** The module in pieces of a few owners each, in their order. */
export function piecesOf({ shape, owners }: SharedModule<Adapter>): SharedModule<Adapter>[] {
  const rank = Math.max(...owners.map(({ modules }) => modules.get(shape.name)!.rank), 1);
  const count = Math.max(1, Math.floor(PIECE_BYTES / (4 * rank * (shape.in + shape.out))));
  const pieces: SharedModule<Adapter>[] = [];
  for (let at = 0; at < owners.length; at += count) pieces.push({ shape, owners: owners.slice(at, at + count) });
  return pieces;
}
