/** The stack of one module: what all adapters that adapt it hold of it. */
import type { Adapter } from "../adapters/adapter.ts";
import type { SharedModule } from "../adapters/modules.ts";
import type { ModuleStack } from "../extract/extract.ts";
import type { Term } from "../tensor/term.ts";

/** Reads a module of its owners, in their order. @throws AdapterError for a value that is no number */
export async function readStack({
  shape,
  owners,
}: SharedModule<Adapter>): Promise<{ stack: ModuleStack; terms: readonly Term[] }> {
  const terms = await Promise.all(owners.map(({ modules }) => modules.get(shape.name)!.read()));
  const members = terms.map((term, i) => ({ ...term, id: owners[i]!.id }));
  return { stack: { ...shape, members }, terms };
}
