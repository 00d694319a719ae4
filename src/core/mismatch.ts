/**
 * True if a base is the right one: fingerprints of its weights, what other versions of transformers call them, and what is said of a module
 * whose weight is not there or not as it must be.
 */
import { BaseMismatchError } from "../errors.ts";
import { FINGERPRINT_SIZE, type PackModule } from "../format/format.ts";
import { bf16ToF32, type FloatDtype, f16ToF32 } from "../tensor/dtypes.ts";
import { toUtf8 } from "../text.ts";
import { asWeight, type Located, type ModuleToFind, NameMatcher, type NotFound, type WeightResolver } from "./base.ts";

/** Candidates that are named at most. */
const MOST_NAMED = 8;

/**
 * The base's name of a module's weight.
 * @param byHand names of weights by module name, before anything else
 * @param alike names of weights that it may be, whatever they are called
 * @throws BaseMismatchError when the weight is missing or ambiguous
 */
export function findWeight(
  names: NameMatcher,
  module: string,
  byHand?: ReadonlyMap<string, string>,
  alike: () => string[] = () => [],
): string {
  const found = names.find(byHand?.get(module) ?? `${module}.weight`);
  if ("name" in found) return found.name;
  throw notFound(module, found, found.ambiguous ? [] : alike());
}

/**
 * Error for a module whose weight is missing or ambiguous.
 * @param alike names of weights that it may be, whatever they are called
 */
export function notFound(module: string, found: NotFound, alike: readonly string[] = []): BaseMismatchError {
  const likely = found.candidates();
  const candidates = [...new Set([...likely, ...alike])].slice(0, Math.max(MOST_NAMED, likely.length));
  return new BaseMismatchError(
    `"${module}" ${found.ambiguous ? "matches several weights" : "is not"} in the base; ` +
      `candidates: ${candidates.join(", ") || "none (another model?)"}. If the names differ, map them with the option \`names\``,
    { module, candidates },
  );
}

/**
 * The weight of a module.
 * @throws BaseMismatchError when it is missing, ambiguous or of another shape
 */
export function locate(resolver: WeightResolver, module: ModuleToFind): Located {
  const found = resolver.weight(module);
  if (found) return found;
  const { parameters, names, byHand } = resolver;
  const fitting = (): string[] =>
    [...parameters.values()].filter((one) => asWeight(module, one)).map(({ name }) => name);
  const weight = findWeight(names, module.name, byHand, fitting);
  const { shape, layout = module.layout } = parameters.get(weight)!;
  const transposed = layout === "in-out" || layout === "embedding";
  const expected = transposed ? [module.in, module.out] : [module.out, module.in];
  throw shapeMismatch(module, weight, expected, shape, transposed);
}

/**
 * The weights of modules that a runtime has not found, under the names of other versions too.
 * @throws BaseMismatchError for the first module whose weight is missing, ambiguous, of another shape or another module's too
 */
export function locateModules(resolver: WeightResolver, modules: readonly PackModule[]): Located[] {
  resolver.names = new AliasMatcher(resolver.parameters.keys());
  const weights = modules.map((module) => locate(resolver, module));
  refuseShared(
    modules,
    weights.map(({ name }) => name),
  );
  return weights;
}

/** @param transposed whether the weight is stored as [in, out] */
export function shapeMismatch(
  module: Pick<PackModule, "name" | "out" | "in">,
  weight: string,
  expected: readonly number[],
  found: readonly number[],
  transposed = false,
): BaseMismatchError {
  return new BaseMismatchError(
    `the adapted module "${module.name}" is [out ${module.out}, in ${module.in}], but the base's "${weight}" is ` +
      `[${found.join(", ")}]${transposed ? " (stored as [in, out])" : ""}: it is of another model`,
    { module: module.name, expected, found },
  );
}

/**
 * @param weights the base's name of each module's weight
 * @throws BaseMismatchError when two modules match one weight
 */
export function refuseShared(modules: readonly Pick<PackModule, "name">[], weights: readonly string[]): void {
  const owners = new Map<string, string>();
  for (const [i, weight] of weights.entries()) {
    const module = modules[i]!.name;
    const other = owners.get(weight);
    if (other !== undefined) {
      const message = `the modules "${other}" and "${module}" both match the weight "${weight}"; map them with the option \`names\``;
      throw new BaseMismatchError(message, { module, candidates: [weight] });
    }
    owners.set(weight, module);
  }
}

/** One way of calling modules against another, by segments; "#" is a number. Earlier pairs come first, in both directions. */
type Renaming = readonly (readonly [former: string, now: string])[];

const attention = (inside: string): Renaming => [
  [`attention.${inside}.query`, "attention.q_proj"],
  [`attention.${inside}.key`, "attention.k_proj"],
  [`attention.${inside}.value`, "attention.v_proj"],
  ["attention.output.dense", "attention.o_proj"],
];
const PERCEPTRON: Renaming = [
  ["intermediate.dense", "mlp.fc1"],
  ["output.dense", "mlp.fc2"],
];

const RENAMINGS: readonly Renaming[] = [
  // ViT, DeiT, BEiT, AST, ViT-MAE.
  [["encoder.layer.#", "layers.#"], ...attention("attention"), ...PERCEPTRON],
  // DINOv2.
  attention("attention"),
  // Swin.
  [...attention("self"), ...PERCEPTRON],
  // SegFormer.
  [
    ["encoder.block.#", "stages.#.blocks"],
    ["decode_head.linear_c", "decode_head.linear_projections"],
    ...attention("self"),
    ["mlp.dense1", "mlp.fc1"],
    ["mlp.dense2", "mlp.fc2"],
  ],
  // Models of images and text, around a language model; and that one exported by itself.
  [
    ["language_model.model", "model.language_model"],
    ["vision_tower.vision_model", "model.vision_tower"],
  ],
  [["model.layers", "model.language_model.layers"]],
];

const patterns = new Map<string, RegExp>();

/** Whole segments, wherever they stand in a name. */
function patternOf(segments: string): RegExp {
  let pattern = patterns.get(segments);
  if (!pattern) {
    const inside = segments.replaceAll(".", "\\.").replace("#", "(?<number>\\d+)");
    patterns.set(segments, (pattern = new RegExp(`(?<before>^|\\.)${inside}(?=\\.)`, "g")));
  }
  return pattern;
}

/** Other names that a parameter may have, each once, without its own. */
function aliasesOf(name: string): Set<string> {
  const found = new Set<string>();
  for (const renaming of RENAMINGS) {
    for (const [from, to] of [
      [0, 1],
      [1, 0],
    ] as const) {
      let other = name;
      for (const pair of renaming) {
        const replacement = `$<before>${pair[to].replace("#", "$<number>")}`;
        other = other.replace(patternOf(pair[from]), replacement);
      }
      found.add(other);
    }
  }
  found.delete(name);
  return found;
}

/** Finds what its own name does not find by what other versions call it. Loaded where names alone do not do. */
export class AliasMatcher extends NameMatcher {
  override find(name: string): ReturnType<NameMatcher["find"]> {
    const own = super.find(name);
    if ("name" in own || own.ambiguous) return own;
    const names = new Set<string>();
    for (const alias of aliasesOf(name)) {
      const found = super.find(alias);
      if ("name" in found) names.add(found.name);
      else if (found.ambiguous) for (const candidate of found.candidates()) names.add(candidate);
    }
    const [first, ...others] = names;
    if (first === undefined) return own;
    return others.length === 0 ? { name: first } : { ambiguous: true, candidates: () => [...names] };
  }
}

/** Correlation from which two float models are the same. */
export const SAME_FLOAT = 0.999;

/** Correlation from which a quantised model is the same as a float one. */
export const SAME_QUANTIZED = 0.95;

/** The value of a weight at output o and input n. */
export type WeightAt = (o: number, n: number) => number;

/**
 * The values of a weight as it is stored.
 * @param bytes of any alignment
 * @param transposed whether it is stored as [in, out]
 */
export function weightAt(
  bytes: Uint8Array,
  type: FloatDtype,
  out: number,
  inputs: number,
  transposed: boolean,
): WeightAt {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  return (o, n) => {
    const at = transposed ? n * out + o : o * inputs + n;
    if (type === "f32") return view.getFloat32(4 * at, true);
    return (type === "f16" ? f16ToF32 : bf16ToF32)(view.getUint16(2 * at, true));
  };
}

/** The fingerprint of a module's weight. */
export function fingerprint(name: string, out: number, inputs: number, at: WeightAt): Float32Array {
  let x = 0x811c9dc5;
  for (const byte of toUtf8(name)) x = Math.imul(x ^ byte, 0x01000193);
  if (x === 0) x = 1;
  const draw = (n: number): number => {
    x ^= x << 13;
    x ^= x >>> 17;
    x ^= x << 5;
    return (x >>> 0) % n;
  };
  const values = new Float32Array(FINGERPRINT_SIZE);
  for (let i = 0; i < values.length; i++) {
    const o = draw(out);
    values[i] = at(o, draw(inputs));
  }
  return values;
}

/** @throws BaseMismatchError as `checkFingerprint` */
export function checkWeight(module: PackModule, weight: Located, bytes: Uint8Array, bases: Uint8Array): void {
  const values = weightAt(bytes, weight.dtype, module.out, module.in, weight.transposed);
  checkFingerprint(module, weight.name, values, bases, SAME_FLOAT);
}

/**
 * @param least correlation to accept
 * @param name of the weight in the base
 * @throws BaseMismatchError when the weight is not the one that the pack's fingerprint was taken of
 */
export function checkFingerprint(
  module: PackModule,
  name: string,
  at: WeightAt,
  bases: Uint8Array,
  least: number,
): void {
  const stored = new Float32Array(bases.slice(module.fingerprint!, module.fingerprint! + 4 * FINGERPRINT_SIZE).buffer);
  const found = correlation(stored, fingerprint(module.name, module.out, module.in, at));
  if (found >= least) return;
  throw new BaseMismatchError(
    `the base's "${name}" is not the weight that "${module.name}" was trained on: their fingerprints correlate by ` +
      `${found.toFixed(4)}, at least ${least} is expected. Use the base of the adapters, or pass anyBase: true`,
    { module: module.name, expected: least, found },
  );
}

/** Pearson correlation; 1 for equal lists, and 0 where one list is constant and they differ. */
export function correlation(a: Float32Array, b: Float32Array): number {
  if (a.every((v, i) => v === b[i])) return 1;
  const mean = (v: Float32Array): number => v.reduce((sum, x) => sum + x, 0) / v.length;
  const [ma, mb] = [mean(a), mean(b)];
  let [ab, aa, bb] = [0, 0, 0];
  a.forEach((v, i) => {
    ab += (v - ma) * (b[i]! - mb);
    aa += (v - ma) ** 2;
    bb += (b[i]! - mb) ** 2;
  });
  return aa > 0 && bb > 0 ? ab / Math.sqrt(aa * bb) : 0;
}
