/** Adapters of the models of one pipeline, as one: named from the pipeline down, as in the files of diffusers. */
import type { TaskMetadata } from "../format/format.ts";
import type { Adapter, AdapterModule } from "./adapter.ts";
import { withTextModel } from "./diffusers-keys.ts";
import { compare } from "./modules.ts";

/**
 * @param models by the name of the model ("unet", "text_encoder"). Closed by the adapter's `close`
 * @param metadata of the task
 */
export function joinModels(
  { id, file }: Pick<Adapter, "id" | "file">,
  models: ReadonlyMap<string, Adapter>,
  metadata: TaskMetadata,
): Adapter {
  const all = [...models];
  const modules = all.flatMap(([model, adapter]) =>
    [...adapter.modules.values()].map((module): AdapterModule => {
      return { ...module, name: `${model}.${withTextModel(module.name, model)}`, read: () => module.read() };
    }),
  );
  const saved = all.flatMap(([model, adapter]) =>
    adapter.saved.map((one) => ({ ...one, name: `${model}.${one.name}` })),
  );
  const bases = new Set(all.map(([, { baseModel }]) => baseModel));
  return {
    id,
    file,
    byteLength: all.reduce((sum, [, { byteLength }]) => sum + byteLength, 0),
    baseModel: bases.size === 1 ? [...bases][0] : undefined,
    modules: new Map(modules.map((module) => [module.name, module] as const).sort(([a], [b]) => compare(a, b))),
    saved: saved.sort((a, b) => compare(a.name, b.name)),
    metadata,
    warnings: all.flatMap(([model, { warnings }]) => warnings.map((text) => `${model}: ${text}`)),
    async close() {
      for (const adapter of models.values()) await adapter.close();
    },
  };
}
