/**
 * Tasks of a pack as they are written again, and like which new ones are written.
 */
import { layoutFresh, type TaskToWrite } from "../format/layout.ts";
import type { Pack } from "../pack/pack.ts";
import { completeDtypes } from "../pack/report.ts";
import type { Dtypes } from "../tensor/dtypes.ts";

/** A task of the pack as it is. */
export async function taskOf(pack: Pack, id: string): Promise<TaskToWrite> {
  return { entry: pack.tasks.get(id)!, blob: (await pack.load(id)).bytes };
}

/** A pack of the same basis and other tasks. */
export async function packWith(pack: Pack, tasks: readonly TaskToWrite[]): Promise<Uint8Array[]> {
  const { basisId, directory } = pack;
  return layoutFresh({ description: directory.basisBytes, bases: (await pack.bases()).bytes, basisId, tasks });
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
