/**
 * A learned task as a pack with a step stores its tasks: brought into it as an adapter that is added, over what others share and with rows
 * of its own beside, in integers of as many bits as they are worth.
 */
import type { Adapter } from "../adapters/adapter.ts";
import type { Pack } from "../core/pack.ts";
import { encodeTaskFile } from "../format/encode.ts";
import type { TaskMetadata } from "../format/format.ts";
import { projectAdapters } from "../pack/add.ts";
import type { Term } from "../tensor/term.ts";
import type { layersOf } from "./head.ts";

/** A task as it was learned. */
interface Learned {
  readonly id: string;
  readonly metadata: TaskMetadata;
  /** Factors by module name. */
  readonly terms: ReadonlyMap<string, Term>;
  readonly head: ReturnType<typeof layersOf>;
}

/**
 * The task's file.
 * @param error the share of its ΔW that it may lose
 * @throws AdapterError for values that no pack can hold
 */
export async function smallTask(pack: Pack, learned: Learned, error: number): Promise<Uint8Array<ArrayBuffer>> {
  const formats = { basis: "f16", coefficients: "f16", head: "int4" } as const;
  const [task] = await projectAdapters(pack, [adapterOf(pack, learned)], formats, { error });
  return encodeTaskFile(task!.entry, pack.basisId, task!.blob);
}

function adapterOf({ name: file, modules }: Pack, { id, metadata, terms, head }: Learned): Adapter {
  const own = modules.flatMap(({ A: _, B: __, fingerprint: ___, ...module }) => {
    const term = terms.get(module.name);
    return term ? [[module.name, { ...module, rank: term.rank, read: async () => term }] as const] : [];
  });
  const saved = head.flatMap(({ layer: { module, in: inputs, out, bias: has }, weight, bias }) => [
    { name: `${module}.weight`, role: "saved" as const, shape: [out, inputs], read: async () => weight },
    ...(has ? [{ name: `${module}.bias`, role: "saved" as const, shape: [out], read: async () => bias }] : []),
  ]);
  const nothing = { byteLength: 0, baseModel: undefined, warnings: [], close: async () => {} };
  return { id, file, modules: new Map(own), saved, metadata, ...nothing };
}
