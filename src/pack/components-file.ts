/**
 * The components of a pack as a safetensors file, for those who train elsewhere: a LoRA whose rows are coefficients over these components
 * loses nothing when it is added. Makes the contents only; the caller writes them.
 */
import { f32Bytes } from "../adapters/adapter.ts";
import { checkPack } from "../arguments.ts";
import type { Pack } from "../core/pack.ts";
import { type PackModule, readTensor, type Side } from "../format/format.ts";
import type { SafetensorsEntry } from "../tensor/safetensors.ts";
import { storedDtypes } from "./add.ts";

/** The key in the file's metadata by which it is known; its value is the basis id of the pack. */
export const COMPONENTS = "eigenlora.components";

/** Components of a pack, to be written by `writeSafetensors`. */
export interface ComponentsFile {
  /**
   * `MODULE.A.components` [K, in] and `MODULE.B.components` [K, out], f32 as the pack decodes them, [K, rank, width] of a
   * flat pack; with a mean also `MODULE.A.mean`, without the first dimension. Rows of B are those of Bᵀ, scale included.
   */
  readonly tensors: readonly SafetensorsEntry[];
  /**
   * Strings: `base_model`, `coefficients` (their number format), `gauge`, `modules` (JSON, names of all that can be adapted), and
   * `rank`, the most that a task keeps, where the pack limits it.
   */
  readonly metadata: Map<string, string>;
  /** How many modules can be adapted, and how many of their sides have components of all tasks; rows of the others are free. */
  readonly modules: number;
  readonly sides: number;
  /** Releases the pack's bases, after the tensors are written. */
  close(): void;
}

/**
 * Reads the components that all tasks of a pack share, one tensor at a time. Embeddings are left out: PEFT holds their factors apart.
 * @throws SourceError, FormatError when the pack cannot be read
 */
export async function componentsFile(pack: Pack): Promise<ComponentsFile> {
  checkPack("componentsFile", pack);
  const modules = pack.modules.filter(({ layout }) => layout !== "embedding");
  const sides = modules.flatMap((module) => [sideOf(module, "A"), sideOf(module, "B")]);
  const { coefficients } = await storedDtypes(pack);
  const { baseModel, gauge, rank } = pack.directory.basis;
  const { bytes, close } = await pack.bases();
  return {
    tensors: sides.flatMap(({ name, basis }) => (basis ? tensorsOf(name, basis, bytes) : [])),
    metadata: new Map([
      ["format", "pt"],
      [COMPONENTS, pack.basisId],
      ...(baseModel === undefined ? [] : [["base_model", baseModel] as const]),
      ["coefficients", coefficients],
      ...(rank === undefined ? [] : [["rank", `${rank}`] as const]),
      ["gauge", gauge],
      ["modules", JSON.stringify(modules.map(({ name }) => name))],
    ]),
    modules: modules.length,
    sides: sides.filter(({ basis }) => basis).length,
    close,
  };
}

/** A side that tasks share in groups is free: coefficients would have to choose one. */
function sideOf({ name, ...module }: PackModule, side: "A" | "B"): { name: string; basis: Side | undefined } {
  const [basis, ...others] = module[side];
  return { name: `${name}.${side}`, basis: basis && basis.K > 0 && others.length === 0 ? basis : undefined };
}

function tensorsOf(name: string, { K, rank, mean, tensor }: Side, bases: Uint8Array): SafetensorsEntry[] {
  const { width } = tensor;
  const row = rank === undefined ? [width] : [rank, width / rank];
  const read = (from: number, to: number) => (): Uint8Array =>
    f32Bytes(readTensor(bases, tensor).subarray(from * width, to * width));
  const entry = (part: string, shape: number[], read: () => Uint8Array): SafetensorsEntry => {
    return { name: `${name}.${part}`, dtype: "F32", shape, read };
  };
  const components = entry("components", [K, ...row], read(0, K));
  return mean ? [components, entry("mean", row, read(K, K + 1))] : [components];
}
