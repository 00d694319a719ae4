/**
 * Adapters onto the basis of a pack that exists (DESIGN.md 2.10a).
 */
import type { Adapter } from "../adapters/adapter.ts";
import { checkAdapters, refuseBoth } from "../adapters/modules.ts";
import { checkPack } from "../arguments.ts";
import { AdapterError } from "../errors.ts";
import type { Gauge } from "../extract/options.ts";
import { type ModuleSpace, openModule, projectModule } from "../extract/project.ts";
import { fastProducts } from "../extract/wasm-products.ts";
import type { TermInput } from "../format/encode.ts";
import type { PackModule } from "../format/format.ts";
import type { TaskToWrite } from "../format/layout.ts";
import { encodedTensor } from "../format/tensors.ts";
import type { Dtypes } from "../tensor/dtypes.ts";
import type { Pack } from "./pack.ts";
import { lossesOf, type ModuleError, type TaskLoss } from "./report.ts";
import { encodeAdapter, encodeTerm, storable } from "./tasks.ts";

/** A task made for an existing basis, and what it lost. */
export interface ProjectedAdapter extends TaskToWrite {
  readonly residual: TaskLoss;
}

/**
 * Projects adapters onto the basis of a pack, in its gauge and to its rank; module by module, so that each basis is opened once.
 * @param onProgress called after each module
 * @throws AdapterError when one adapts a module that the pack does not have, or of another shape
 */
export async function projectAdapters(
  pack: Pack,
  adapters: readonly Adapter[],
  dtype: Dtypes,
  onProgress?: (done: number, of: number) => void,
): Promise<ProjectedAdapter[]> {
  checkPack("projectAdapters", pack);
  checkAdapters("projectAdapters", adapters);
  const gauge = gaugeOf(pack);
  const { rank } = pack.directory.basis;
  for (const adapter of adapters) checkModules(pack, adapter);
  const products = await fastProducts();
  const errors: ModuleError[] = [];
  const terms = adapters.map((): TermInput[] => []);
  const bases = await pack.bases();
  try {
    for (const [index, stored] of pack.modules.entries()) {
      let space: ModuleSpace | undefined;
      for (const [i, adapter] of adapters.entries()) {
        const module = adapter.modules.get(stored.name);
        if (!module) continue;
        const opened = (space ??= openModule(storedModule(stored, bases.bytes, adapter), products));
        const term = await module.read();
        const task = storable(adapter, stored, () =>
          projectModule(opened, { id: adapter.id, ...term }, { gauge, rank, coefficientDtype: dtype.coefficients }),
        );
        errors.push({ task: adapter.id, module: stored.name, error: task.error, norm: task.norm });
        terms[i]!.push(encodeTerm({ index, name: stored.name }, task, opened, term.magnitude, adapter, dtype));
      }
      onProgress?.(index + 1, pack.modules.length);
    }
  } finally {
    bases.close();
  }
  const names = pack.modules.map((m) => m.name);
  const residuals = lossesOf(
    errors,
    adapters.map(({ id }) => id),
  );
  return await Promise.all(
    adapters.map(async (adapter, i): Promise<ProjectedAdapter> => {
      return { ...(await encodeAdapter(adapter, terms[i]!, names, dtype.head)), residual: residuals[i]! };
    }),
  );
}

/** The gauge that a pack's tasks are in. */
export function gaugeOf({ directory }: Pack): Gauge {
  return directory.basis.gauge === "balanced" ? "balanced" : "as-trained";
}

/** @throws AdapterError when the pack has no basis for a module of an adapter */
function checkModules(pack: Pack, adapter: Adapter): void {
  refuseBoth(adapter);
  const known = new Map(pack.modules.map((m) => [m.name, m]));
  const missing = [...adapter.modules.keys()].filter((name) => !known.has(name));
  if (missing.length > 0) {
    throw new AdapterError(
      `it adapts ${missing.length} modules that ${pack.name} has no basis for (${missing.slice(0, 3).join(", ")}` +
        `${missing.length > 3 ? ", …" : ""}): pack all adapters again, with this one`,
      { file: adapter.file, field: missing[0]! },
    );
  }
  for (const [name, module] of adapter.modules) {
    const stored = known.get(name)!;
    if (stored.out === module.out && stored.in === module.in && stored.layout === module.layout) continue;
    throw new AdapterError(
      `"${name}" is [${module.out}, ${module.in}] ${module.layout}, the pack's is [${stored.out}, ${stored.in}] ` +
        `${stored.layout}: it was trained on another model`,
      { file: adapter.file, field: name },
    );
  }
}

/** Both sides of a module of a pack, as extraction takes them. */
export function storedModule(
  module: PackModule,
  bases: Uint8Array,
  adapter: Adapter,
): Parameters<typeof openModule>[0] {
  const side = (which: "A" | "B"): Parameters<typeof openModule>[0]["A"] => {
    const basis = module[which];
    if (!basis) {
      throw new AdapterError(`"${module.name}" has no basis in the pack: pack all adapters again`, {
        file: adapter.file,
        field: module.name,
      });
    }
    const { dtype, width } = basis.tensor;
    const encoded = encodedTensor(bases, basis.tensor);
    return { dtype, components: basis.K, width, rank: basis.rank, mean: basis.mean, encoded };
  };
  return { A: side("A"), B: side("B") };
}
