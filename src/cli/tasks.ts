/** New tasks of a pack are written as those that it has. */
import type { Adapter } from "../adapters/adapter.ts";
import { refuseBases } from "../adapters/modules.ts";
import type { Pack } from "../pack/pack.ts";
import { completeDtypes } from "../pack/recipe.ts";
import type { Dtypes } from "../tensor/dtypes.ts";

/** @throws AdapterError when adapters name another base model than the pack does */
export function refuseOtherBase({ name, directory }: Pack, adapters: readonly Adapter[], anyBase: boolean): void {
  const { baseModel } = directory.basis;
  refuseBases([{ id: "the pack", file: name, baseModel }, ...adapters], anyBase);
}

/** The number formats that a pack's tasks are stored in, so that new ones are stored alike. */
export async function storedDtypes(pack: Pack): Promise<Dtypes> {
  const first = pack.tasks.keys().next().value;
  if (first === undefined) return completeDtypes();
  const { terms, parameters } = await pack.load(first);
  const coefficients = terms.find((term) => term.A)?.A?.tensor.dtype;
  const head = parameters.find(({ shape }) => shape.length > 1)?.tensor.dtype;
  return completeDtypes({ ...(coefficients ? { coefficients } : {}), ...(head ? { head } : {}) });
}
