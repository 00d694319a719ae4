/**
 * Identity of a base's weights: which of them a module of an adapter is, by its name or by that of another version of
 * transformers; fingerprints; values that tied weights share; and errors for a module whose weight is not there, not as
 * it must be, or not of DoRA's size.
 */
import { BaseMismatchError, nearest } from "../errors.ts";
import { FINGERPRINT_SIZE, type Layout, moduleOf, type PackModule } from "../format/format.ts";
import { bf16ToF32, elementsOf, type FloatDtype, f16ToF32, mean } from "../tensor/dtypes.ts";
import { toUtf8 } from "../text.ts";
import {
  byteLengthOf,
  type CpuView,
  type Located,
  onDevice,
  type Parameter,
  sameShape,
  type WeightHost,
} from "./base.ts";
import type { KernelSession, ModulePlan } from "./kernel-session.ts";
import type { ParameterChange } from "./merge.ts";

/** Segments that are dropped at most, so that a long name makes no more than a few others. */
const MOST_DROPPED = 64;

/** Why there is no one name. */
interface NotFound {
  readonly ambiguous: boolean;
  /** Names that are equally good, or look alike. */
  candidates(): readonly string[];
}

/**
 * Finds, for names of an adapter, the parameters of a base model they mean: by the longest common suffix of whole
 * dotted segments that is the whole of one of the two names. "bert.encoder.layer.0.query.weight" finds
 * "encoder.layer.0.query.weight", and the other way round; "layer.1.query" never finds "layer.0.query". A name that
 * finds nothing is looked for by what other versions of transformers call it.
 */
export class NameMatcher {
  readonly #exact = new Set<string>();
  /** Base names by each of their proper suffixes. */
  readonly #bySuffix = new Map<string, string[]>();

  constructor(baseNames: Iterable<string>) {
    for (const name of baseNames) {
      this.#exact.add(name);
      for (const suffix of suffixesOf(name)) {
        const names = this.#bySuffix.get(suffix);
        if (names) names.push(name);
        else this.#bySuffix.set(suffix, [name]);
      }
    }
  }

  /** The base's name; or the candidates, when there are several equally good ones or none. */
  find(name: string): { name: string } | NotFound {
    let found = this.#called(name);
    if (found.length === 0) found = [...new Set([...aliasesOf(name)].flatMap((alias) => this.#called(alias)))];
    if (found.length === 1) return { name: found[0]! };
    // The nearest are computed when asked for: they take a step for each pair of letters of each name.
    const ambiguous = found.length > 1;
    return { ambiguous, candidates: () => (ambiguous ? found : nearest(name, this.#exact)) };
  }

  /** The base's names that a name means as it is: one, or several that are equally good. */
  #called(name: string): readonly string[] {
    if (this.#exact.has(name)) return [name];
    const longer = this.#bySuffix.get(name);
    if (longer) return longer;
    for (const suffix of suffixesOf(name)) {
      // A bare "weight" or "bias" says nothing about which module it belongs to.
      if (suffix.includes(".") && this.#exact.has(suffix)) return [suffix];
    }
    return [];
  }
}

/** A name without its first segment, without its first two, and so on. */
function* suffixesOf(name: string): Generator<string, void> {
  let at = name.indexOf(".");
  for (let dropped = 0; at >= 0 && dropped < MOST_DROPPED; dropped++) {
    yield name.slice(at + 1);
    at = name.indexOf(".", at + 1);
  }
}

/** Fields of a module that identify its weight in the base. */
type ModuleToFind = Pick<PackModule, "name" | "out" | "in" | "layout"> & Partial<Pick<PackModule, "kernel">>;

/** The parameters of a host, found by an adapter's names. */
export class WeightResolver {
  readonly parameters: ReadonlyMap<string, Parameter>;
  readonly names: NameMatcher;
  /** Names of weights by module name, before anything else. */
  readonly byHand: ReadonlyMap<string, string> | undefined;

  constructor(host: WeightHost | undefined, byHand?: ReadonlyMap<string, string>) {
    this.byHand = byHand;
    const parameters = new Map<string, Parameter>();
    for (const parameter of host?.list() ?? []) parameters.set(parameter.name, parameter);
    this.parameters = parameters;
    this.names = new NameMatcher(parameters.keys());
  }

  /** The base's name of a parameter, in the layer that its module is mapped to, if it is; or the candidates. */
  find(name: string): ReturnType<NameMatcher["find"]> {
    const at = name.lastIndexOf(".");
    const weight = this.byHand?.get(name.slice(0, at));
    const leaf = name.slice(at + 1);
    const mapped = weight && this.names.find(leaf === "weight" ? weight : weight.replace(/[^.]*$/, leaf));
    return mapped && "name" in mapped ? mapped : this.names.find(name);
  }

  /**
   * The base's name of a module's weight.
   * @param alike names of weights that it may be, whatever they are called
   * @throws BaseMismatchError when the weight is missing or ambiguous
   */
  nameOf(module: string, alike: () => string[] = () => []): string {
    const found = this.names.find(this.byHand?.get(module) ?? `${module}.weight`);
    if ("name" in found) return found.name;
    throw notFound(module, found, found.ambiguous ? [] : alike());
  }

  /** The weight of a module. @throws BaseMismatchError when it is missing, ambiguous or of another shape */
  locate(module: ModuleToFind): Located {
    const fitting = (): Parameter[] => [...this.parameters.values()].filter((each) => asWeight(module, each));
    const name = this.nameOf(module.name, () => fitting().map((parameter) => parameter.name));
    const parameter = this.parameters.get(name)!;
    const found = asWeight(module, parameter);
    if (found) return found;
    const { shape, layout = module.layout } = parameter;
    const transposed = isTransposed(layout);
    const expected = transposed ? [module.in, module.out] : [module.out, module.in];
    throw shapeMismatch(module, name, expected, shape, transposed);
  }
}

function isTransposed(layout: Layout): boolean {
  return layout === "in-out" || layout === "embedding";
}

/** A parameter as the weight of a module; undefined where it has another shape. */
function asWeight(module: ModuleToFind, parameter: Parameter): Located | undefined {
  const { shape, layout = module.layout } = parameter;
  const transposed = isTransposed(layout);
  const window = shape.slice(2);
  if (module.kernel?.length === window.length && !sameShape(module.kernel, window)) return undefined;
  const matrix = [shape[0] ?? 0, elementsOf(shape.slice(1))];
  if (!sameShape(transposed ? [module.in, module.out] : [module.out, module.in], matrix)) return undefined;
  return { ...parameter, transposed, byteLength: byteLengthOf(parameter) };
}

/** Candidates that are named at most. */
const MOST_NAMED = 8;

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

/**
 * One way of calling modules against another, by segments; "#" is a number. Earlier pairs come first, in both
 * directions.
 */
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
function correlation(a: Float32Array, b: Float32Array): number {
  if (a.every((v, i) => v === b[i])) return 1;
  const [ma, mb] = [mean(a), mean(b)];
  let [ab, aa, bb] = [0, 0, 0];
  a.forEach((v, i) => {
    ab += (v - ma) * (b[i]! - mb);
    aa += (v - ma) ** 2;
    bb += (b[i]! - mb) ** 2;
  });
  return aa > 0 && bb > 0 ? ab / Math.sqrt(aa * bb) : 0;
}

// Weights of a base that are one in the model: a head that is tied to an embedding, or two embeddings. Files have such
// a weight once, or once for each layer with the same values; nothing else in them tells. An untied weight that equals
// the other is taken for tied.

/** A matrix, and how exactly its numbers are known: "other" is quantised. */
export interface Matrix {
  readonly at: WeightAt;
  readonly dtype: FloatDtype | "other";
}

/**
 * Says whether two matrices [out, in] have the same values: all of them, or some up to rounding where their types
 * differ.
 */
export function sameValues(a: Matrix, b: Matrix, out: number, inputs: number): boolean {
  const likeness = correlation(fingerprint("", out, inputs, a.at), fingerprint("", out, inputs, b.at));
  if (a.dtype === "other" || b.dtype === "other") return likeness >= SAME_QUANTIZED;
  if (a.dtype !== b.dtype || likeness < SAME_FLOAT) return likeness >= SAME_FLOAT;
  for (let o = 0; o < out; o++) for (let n = 0; n < inputs; n++) if (!Object.is(a.at(o, n), b.at(o, n))) return false;
  return true;
}

/** Names in transformers of layers that are tied to an embedding. */
const HEADS = /(^|\.)(lm_head|embed_out|proj_out|predictions\.decoder|output_projection)\.weight$/;

/** True if others follow a parameter that they are tied to: an embedding's table, not a head's weight. */
export function leads({ name, layout }: Pick<Parameter, "name" | "layout">): boolean {
  return layout === "embedding" || (layout === undefined && !HEADS.test(name));
}

/** True if a parameter may be tied to a table [rows, width], by its shape. A layer's weight may lie across it. */
function mayBeTied({ shape }: Pick<Parameter, "shape">, table: readonly number[]): boolean {
  return sameShape(shape, table) || (table.length === 2 && sameShape(shape, [...table].reverse()));
}

/** True if a parameter of the right shape has the values of a table [rows, width]. */
function isTied(one: CpuView & Pick<Parameter, "layout">, table: CpuView): boolean {
  const [rows = 0, width = 0] = table.shape;
  const matrix = ({ data, byteOffset, dtype }: CpuView, across: boolean): Matrix => {
    return { at: weightAt(data.subarray(byteOffset), dtype, rows, width, across), dtype };
  };
  const liesAcross = one.layout === "in-out" || !sameShape(one.shape, table.shape);
  return sameValues(matrix(one, liesAcross), matrix(table, false), rows, width);
}

/** A base in which tied parameters are looked for. */
export interface TiedBase {
  readonly parameters: ReadonlyMap<string, Parameter>;
  readonly host: WeightHost | undefined;
  /** Names of parameters that are left as they are. */
  readonly ignored: ReadonlySet<string>;
  /** Names of parameters that are tied to an embedding, by its name: filled by `tieRows`. */
  readonly tied: Map<string, readonly string[]>;
  /** Name of the module that a parameter is the adapted weight of. */
  moduleOf(name: string): string | undefined;
  /** The pristine value of an embedding, which is kept. */
  table(name: string): Promise<CpuView>;
  /** The pristine value of another parameter. */
  read(name: string): Promise<CpuView>;
}

/**
 * Copies rows of an embedding to the parameters tied to it, in `changes`, for tasks that bring none for them.
 * @returns names of embeddings whose rows alone change: parameters in the same memory change as well
 * @throws BaseMismatchError for rows of a layer with a bias
 */
export async function tieRows(changes: Map<string, ParameterChange[]>, base: TiedBase): Promise<Set<string>> {
  const isRows = ({ parameter }: ParameterChange): boolean => parameter.role === "rows";
  const isTable = (name: string): boolean => {
    const parameter = base.parameters.get(name);
    return parameter !== undefined && leads(parameter);
  };
  for (const [name, list] of [...changes]) {
    if (!isTable(name) || !list.some(isRows)) continue;
    for (const tied of await tiedTo(name, base)) {
      const others = changes.get(tied) ?? [];
      const module = base.moduleOf(tied);
      const following = list
        .filter((change) => isRows(change) && others.every(({ part }) => part !== change.part))
        .map(({ part, parameter }) => {
          return { part, parameter: { ...parameter, name: module === undefined ? tied : `${module}.weight` } };
        });
      if (following.length > 0) changes.set(tied, [...others, ...following]);
    }
  }
  return new Set([...changes.keys()].filter((name) => isTable(name) && changes.get(name)!.every(isRows)));
}

/** Names of what is tied to an embedding and lies in memory of its own. */
async function tiedTo(name: string, base: TiedBase): Promise<readonly string[]> {
  const known = base.tied.get(name);
  if (known) return known;
  const table = await base.table(name);
  const found: string[] = [];
  for (const parameter of base.parameters.values()) {
    const { name: other, layout } = parameter;
    if (other === name || base.ignored.has(other) || !mayBeTied(parameter, table.shape)) continue;
    if (base.host!.begin && isOnePlace(base.host!, name, other)) continue;
    if (!isTied({ ...(await base.read(other)), ...(layout && { layout }) }, table)) continue;
    if (base.parameters.has(other.replace(/weight$/, "bias"))) throw biasedRows(other);
    found.push(other);
  }
  base.tied.set(name, found);
  return found;
}

/** True if a host has two parameters in the same memory, so that one write changes both. */
function isOnePlace(host: WeightHost, name: string, other: string): boolean {
  const one = host.view?.(name);
  const two = host.view?.(other);
  if (!one || !two || one.byteOffset !== two.byteOffset) return false;
  if (onDevice(one.data) || onDevice(two.data)) return one.data === two.data;
  return one.data.buffer === two.data.buffer && one.data.byteOffset === two.data.byteOffset;
}

/** Refuses rows of a layer with a bias: PEFT leaves the bias out until the adapter is merged, and adds it then. */
export function biasedRows(weight: string): BaseMismatchError {
  const module = moduleOf(weight);
  return new BaseMismatchError(
    `tasks replace rows of "${weight}", of a layer with a bias: PEFT computes it without the bias, and with it once the adapter is ` +
      `merged. Use PEFT's merged model; or, to leave the layer as it is, pass ignore: ["${weight}"]`,
    { module },
  );
}

/**
 * DoRA's scales of plans that have been computed: each begins at its plan's `magnitude`.
 * @throws BaseMismatchError where one is NaN (see `ScaleJob`)
 */
export async function scalesOf(
  plans: readonly (ModulePlan & { magnitude: number })[],
  kernels: KernelSession,
): Promise<Float32Array> {
  if (plans.length === 0) return new Float32Array(0);
  const { buffer, byteOffset } = await kernels.bytesAt(kernels.reserved("scale"), 4 * kernels.buffer.used);
  const scales = new Float32Array(buffer, byteOffset, kernels.buffer.used);
  for (const { module, magnitude } of plans) {
    const { name, out } = kernels.modules[module]!;
    const row = scales.subarray(magnitude, magnitude + out).findIndex(Number.isNaN);
    if (row < 0) continue;
    const message = `"${name}": row ${row}: DoRA's magnitude ÷ the row's norm is out of f32's range: was the task trained on another base?`;
    throw new BaseMismatchError(message, { module: name });
  }
  return scales;
}
