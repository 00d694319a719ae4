/**
 * Values of a model's weights, which weights a model has twice, and a model as a base for a runtime: read-only, since
 * changes of a task reach a model through what runs it. The reader of quantised weights is loaded only for models that
 * have some.
 */

import type { CpuView, View, WeightHost } from "../core/base.ts";
import { fingerprint, type Matrix, sameValues, type WeightAt, weightAt } from "../core/mismatch.ts";
import { BaseMismatchError, FormatError, SourceError } from "../errors.ts";
import type { ReadOptions } from "../source.ts";
import { elementsOf, type FloatDtype } from "../tensor/dtypes.ts";
import {
  asMatrix,
  type Candidate,
  findParameters,
  isMatrix,
  isNameless,
  matrixShape,
  type OnnxParameter,
  outputAxis,
  partStart,
  partsOf,
  pieceShape,
  type Stored,
} from "./modules.ts";
import type { ModelFile } from "./read.ts";
import { readTensor } from "./tensors.ts";

/** @throws FormatError, SourceError as `readTensor`; FormatError when the quantisation is not supported */
export async function readLinearWeight(
  file: ModelFile,
  parameter: Stored & { readonly name: string },
  options?: ReadOptions,
): Promise<WeightAt> {
  const { model, external } = file;
  const { slice, joined, ...all } = parameter;
  if (joined) {
    const rows: WeightAt[] = [];
    for (const part of joined) {
      const at = await readLinearWeight(file, part, options);
      for (let o = 0; o < matrixShape(part)![0]; o++) rows.push((_, n) => at(o, n));
    }
    return (o, n) => rows[o]!(o, n);
  }
  if (slice) {
    const from = partStart(parameter);
    const at = await readLinearWeight(file, all, options);
    return (o, n) => at(o + from, n);
  }
  if (parameter.dtype !== "other") {
    const [out, inputs] = matrixShape(parameter) ?? [0, 0];
    const tensor = model.graph.initializers.get(parameter.initializer)!;
    const { data } = await readTensor(tensor, model.name, external, options);
    return weightAt(data, parameter.dtype, out, inputs, parameter.layout === "in-out");
  }
  const at = await (await import("./dequantize.ts")).readQuantizedWeight(file, parameter, options);
  if (at) return at;
  const use = parameter.uses[0];
  const how = use ? `${use.node.opType} "${use.node.name}"` : "no node";
  const message = `"${parameter.name}" is quantised in a way that is not known here (used by ${how})`;
  throw new FormatError(
    `${message}; pass a model where it is float, or anyBase: true where it is read for its fingerprint only`,
    { file: model.name, part: `initializer ${parameter.initializer}` },
  );
}

// Finds weights that a model contains more than once. An exporter copies a layer that is applied in several ways, for
// instance to inputs of two and of three dimensions: one initializer for a Gemm and a transposed one for a MatMul. A
// task must change all copies. Names tell which weights may be the same (modules.ts); here their values decide,
// whichever way round they are stored.

/** Candidates that a message lists. */
const TOLD = 3;

export class Copies {
  readonly #file: ModelFile;
  readonly #parameters: readonly OnnxParameter[];
  readonly #options: ReadOptions | undefined;
  /** True if some weights have no name, so that each may be a copy of any other. */
  readonly #open: boolean;
  readonly #found = new Map<OnnxParameter, Promise<OnnxParameter>>();
  /** Float weights of linear layers without a name, by type, shape and some values; made when first needed. */
  #nameless: ReadonlyMap<string, readonly Stored[]> | undefined;

  /** @param parameters of the file, as `findParameters` gives them */
  constructor(file: ModelFile, parameters: readonly OnnxParameter[], options?: ReadOptions) {
    this.#file = file;
    this.#parameters = parameters;
    this.#options = options;
    this.#open = parameters.some(isNameless);
  }

  /**
   * The parameter with its copies, each time the same object.
   * @throws BaseMismatchError when several weights have an equal claim to its name, and their values differ
   */
  of(parameter: OnnxParameter): Promise<OnnxParameter> {
    const known = this.#found.get(parameter);
    if (known) return known;
    const found = this.#find(parameter);
    this.#found.set(parameter, found);
    // A failure is not kept: the next read may succeed.
    found.catch(() => this.#found.delete(parameter));
    return found;
  }

  /** Parameters that are one with a table [rows, width] in the model, wherever the exporter has put them. */
  async tiedTo(table: OnnxParameter): Promise<OnnxParameter[]> {
    const [rows = 0, width = 0] = table.shape;
    const isWeight = ({ uses, layout, dtype }: OnnxParameter): boolean =>
      uses.length > 0 && (layout !== undefined || dtype === "other");
    const found: OnnxParameter[] = [];
    let own: Matrix | undefined;
    for (const parameter of this.#parameters) {
      const matrix = parameter.layout === "embedding" ? parameter.shape : matrixShape(parameter);
      if (!isWeight(parameter) || matrix?.join() !== `${rows},${width}`) continue;
      // Names of one initializer share no use, but for the initializer's own.
      if (parameter.uses.some((use) => table.uses.some(({ node, input }) => node === use.node && input === use.input)))
        continue;
      own ??= await this.#table(table);
      if (parameter.initializer === table.initializer || sameValues(await this.#table(parameter), own, rows, width))
        found.push(await this.of(parameter));
    }
    const copies = new Set(found.flatMap((parameter) => parameter.copies.map(({ initializer }) => initializer)));
    return found.filter(({ initializer }) => !copies.has(initializer));
  }

  /** A weight by rows of tokens. */
  async #table(stored: Stored): Promise<Matrix> {
    const { dtype } = stored;
    if (stored.layout !== "embedding") return { at: await this.#values(stored), dtype };
    const at = await this.#values(asMatrix(stored));
    return { at: (o, n) => at(n, o), dtype };
  }

  async #find(parameter: OnnxParameter): Promise<OnnxParameter> {
    if (parameter.uses.length === 0 || !isMatrix(parameter)) return parameter;
    if (!this.#open && parameter.candidates.length === 0) return parameter;
    const copies: Stored[] = [];
    for (const candidate of parameter.candidates) {
      if (candidate.initializer === parameter.initializer) continue;
      if (await this.#isSame(parameter, candidate)) copies.push(candidate);
      else if (candidate.equal) throw ambiguous(this.#file, parameter);
    }
    const known = new Set([parameter, ...copies].map(({ initializer }) => initializer));
    for (const alike of await this.#alike(parameter)) {
      if (!known.has(alike.initializer) && (await this.#isSame(parameter, alike))) copies.push(alike);
    }
    return { ...parameter, copies };
  }

  /** True if two weights are equal, up to orientation and, between different number formats, up to rounding. */
  async #isSame(a: Stored, b: Stored): Promise<boolean> {
    const [out, inputs] = matrixShape(a)!;
    if (!isMatrix(b) || matrixShape(b)!.join() !== `${out},${inputs}`) return false;
    return sameValues(
      { at: await this.#values(a), dtype: a.dtype },
      { at: await this.#values(b), dtype: b.dtype },
      out,
      inputs,
    );
  }

  async #values(stored: Stored): Promise<WeightAt> {
    const at = await readLinearWeight(this.#file, { ...stored, name: stored.initializer }, this.#options);
    return matrixShape(stored)!.includes(0) ? () => 0 : at;
  }

  /** Weights without a name that may have the same values. */
  async #alike(parameter: OnnxParameter): Promise<readonly Stored[]> {
    if (parameter.dtype === "other") return [];
    this.#nameless ??= await this.#findNameless();
    return this.#nameless.size === 0 ? [] : (this.#nameless.get(await this.#keyOf(parameter)) ?? []);
  }

  async #findNameless(): Promise<ReadonlyMap<string, readonly Stored[]>> {
    const found = new Map<string, Stored[]>();
    const named = new Set(
      this.#parameters.flatMap((parameter) => (isNameless(parameter) ? [] : parameter.initializer)),
    );
    for (const parameter of this.#parameters) {
      if (!isNameless(parameter) || named.has(parameter.initializer)) continue;
      const key = await this.#keyOf(parameter);
      const others = found.get(key);
      if (others) others.push(parameter);
      else found.set(key, [parameter]);
    }
    return found;
  }

  /** Key of a weight: type, shape and some values. */
  async #keyOf(stored: Stored): Promise<string> {
    const [out, inputs] = matrixShape(stored)!;
    return `${stored.dtype} ${out} ${inputs} ${fingerprint("", out, inputs, await this.#values(stored)).join()}`;
  }
}

function ambiguous({ model }: ModelFile, parameter: OnnxParameter): BaseMismatchError {
  const told = (stored: Stored): string => {
    const nodes = stored.uses.map(({ node }) => `${node.opType} "${node.name || node.output[0]}"`);
    return `"${stored.initializer}" of ${nodes.slice(0, TOLD).join(", ")}`;
  };
  const equal: readonly Stored[] = [
    parameter,
    ...parameter.candidates.filter((candidate: Candidate) => candidate.equal),
  ];
  const more = equal.length > TOLD ? ` and ${equal.length - TOLD} more` : "";
  return new BaseMismatchError(
    `${model.name}: "${parameter.name}" may be any of several weights, which differ: ` +
      `${equal.slice(0, TOLD).map(told).join("; ")}${more}. Say which with the option \`names\``,
    { module: parameter.name, candidates: equal.slice(0, TOLD).map(({ initializer }) => initializer) },
  );
}

// A model as a base.

/**
 * The float parameters of a model in memory. Read-only.
 * @param pieces parts of packed parameters, or made of several
 */
export function onnxHost(file: ModelFile, pieces: readonly OnnxParameter[] = []): WeightHost {
  const { model, external, close } = file;
  const all = findParameters(model);
  const copies = new Copies(file, all);
  const floats = [...all, ...pieces].flatMap((parameter) => {
    const { dtype } = parameter;
    return dtype === "other" ? [] : [[parameter.name, { ...parameter, dtype }] as const];
  });
  const parameters = new Map(floats);
  return {
    *list() {
      for (const parameter of parameters.values()) {
        const { name, dtype, layout } = parameter;
        yield { name, shape: pieceShape(parameter), dtype, ...(layout ? { layout } : {}) };
      }
    },
    async read(name, into, options): Promise<View> {
      const parameter = parameters.get(name);
      if (!parameter) throw new SourceError(`has no float parameter "${name}"`, { file: model.name });
      const { dtype, slice, joined, candidates, initializer } = parameter;
      if (candidates.some(({ equal }) => equal)) await copies.of(parameter);
      const { shape, data } =
        slice || joined
          ? await readPiece(file, parameter, options)
          : await readTensor(model.graph.initializers.get(initializer)!, model.name, external, options);
      into?.set(data);
      return { dtype, shape, data: into ?? data, byteOffset: 0 };
    },
    close,
  };
}

/** Reads a parameter that is a part, or made of parts. @throws FormatError, SourceError as `readTensor` */
async function readPiece(
  { model, external }: ModelFile,
  parameter: OnnxParameter & { readonly dtype: FloatDtype },
  options?: ReadOptions,
): Promise<Pick<CpuView, "shape" | "data">> {
  const { copyPart } = await import("./packed.ts");
  const axis = outputAxis(parameter);
  const shape = pieceShape(parameter);
  const width = parameter.dtype === "f32" ? 4 : 2;
  const data = new Uint8Array(width * elementsOf(shape));
  for (const { initializer, at, from, count } of partsOf(parameter)) {
    const whole = await readTensor(model.graph.initializers.get(initializer)!, model.name, external, options);
    copyPart({ ...whole, start: at }, { data, shape, start: from }, axis, count, width);
  }
  return { shape, data };
}
