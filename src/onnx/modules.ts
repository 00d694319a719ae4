/**
 * Finds which parameter of the PyTorch model each initializer of its export is, and its orientation. Exporters keep
 * some names and lose others, merge parameters of equal values, and write one that is applied in two ways down twice;
 * lost names are found again from the nodes that use an initializer. Nothing here reads a value (weights.ts does).
 */

import { sameShape } from "../core/base.ts";
import { FormatError } from "../errors.ts";
import type { Layout } from "../format/format.ts";
import { elementsOf, sum } from "../tensor/dtypes.ts";
import { type Graph, intOf, intsOf, type OnnxModel, type Use } from "./model.ts";
import type { NodeProto } from "./protobuf.ts";
import { type OnnxTensorType, tensorType } from "./tensors.ts";

/** Rows of a packed weight that a layer has: the `index`-th of parts whose sizes are `sizes`. */
export interface Slice {
  readonly index: number;
  readonly sizes: readonly number[];
  readonly of: string;
}

export interface Stored extends OnnxTensorType {
  readonly initializer: string;
  /** Orientation of a weight in the initializer. Absent for vectors and where the use does not tell. */
  readonly layout?: Layout | undefined;
  /** Set where the parameter is a part of the initializer: several layers packed into one. */
  readonly slice?: Slice;
  /**
   * Set where the parameter is several initializers' rows, one below the other: a layer that the exporter has divided.
   */
  readonly joined?: readonly OnnxParameter[];
  /** Nodes that use it, behind Cast, Identity, Transpose and the like. Empty when nothing does. */
  readonly uses: readonly Use[];
}

/** Another initializer that may hold the same parameter. */
export interface Candidate extends Stored {
  /** True if it has as good a claim to the name: if its values differ, there is no telling which of the two it is. */
  readonly equal: boolean;
}

/** A parameter of the model, and the initializer that holds it. One initializer may hold several, merged on export. */
export interface OnnxParameter extends Stored {
  /** Name in the checkpoint, as far as the file tells; where it tells nothing, the initializer's own name. */
  readonly name: string;
  /** Initializers that may hold the same weight once more: their values tell. */
  readonly candidates: readonly Candidate[];
  /** Initializers that hold the same weight, once `Copies` of weights.ts has compared values. */
  readonly copies: readonly Stored[];
}

/** `TensorProto.DataType` of quantised weights: (u)int8, float8, (u)int4, float4, (u)int2. */
const QUANTISED = new Set([2, 3, 17, 18, 19, 20, 21, 22, 23, 25, 26]);

interface Rivals {
  /** The one that has it; undefined where none can be said to. */
  readonly winner: Claim | undefined;
  /** True if others have as good a claim. */
  readonly tied: boolean;
  /** Those that its values must be compared with; the winner may be among them. */
  readonly candidates: Candidate[];
}

/**
 * The model's float parameters and quantised weights. One that was merged with others is listed under each name, one
 * whose name several claim under that of its initializer too.
 * @throws FormatError when a shape is impossible, or nested graphs multiply the uses
 */
export function findParameters(model: OnnxModel): OnnxParameter[] {
  const { graph } = model;
  const claims = new Claims(model);
  const all: Claim[][] = [];
  for (const [initializer, tensor] of graph.initializers) {
    const type = tensorType(tensor, model.name);
    if (type.dtype === "other" && !QUANTISED.has(tensor.dataType) && !isDequantised(graph, initializer)) continue;
    all.push(claims.of(initializer, type));
  }
  const rivals = settle(all.flat());
  /** Rivals for a name, as candidates of one that is listed by its initializer. */
  const others = new Map<Rivals, Candidate[]>();
  return all.flatMap((own) => {
    const won = own.filter((claim) => rivals.get(claim.name)!.winner === claim);
    const found = won.map((claim): OnnxParameter => {
      return { name: claim.name, ...storedOf(claim), candidates: rivals.get(claim.name)!.candidates, copies: [] };
    });
    // A user who knows better can name it by its initializer.
    const lost = own.find(({ name, evidence }) => {
      const { winner, tied } = rivals.get(name)!;
      return tied || (won.length === 0 && (!winner || evidence === EVIDENCE.guessed));
    });
    if (!lost || rivals.get(lost.initializer)?.winner) return found;
    const group = rivals.get(lost.name)!;
    const candidates = others.get(group) ?? group.candidates.map((candidate) => ({ ...candidate, equal: false }));
    others.set(group, candidates);
    return [...found, { name: lost.initializer, ...storedOf(lost), candidates, copies: [] }];
  });
}

/** True if integers are a parameter's: a bias of a quantised layer is int32, as much else is. */
function isDequantised(graph: Graph, initializer: string): boolean {
  const uses = graph.consumers.get(initializer) ?? [];
  return uses.some(({ node, input }) => node.opType === "DequantizeLinear" && input === 0);
}

function storedOf({ initializer, dtype, shape, layout, uses }: Claim): Stored {
  return { initializer, dtype, shape, ...(layout && { layout }), uses };
}

/** Gives each claimed name to its best founded claim. */
function settle(claims: readonly Claim[]): Map<string, Rivals> {
  const byName = new Map<string, Claim[]>();
  for (const claim of claims) {
    const known = byName.get(claim.name);
    if (known) known.push(claim);
    else byName.set(claim.name, [claim]);
  }
  const settled = new Map<string, Rivals>();
  for (const [name, some] of byName) {
    const evidence = some.reduce((most, claim) => Math.max(most, claim.evidence), 0);
    const best = some.filter((claim) => claim.evidence === evidence);
    const tied = best.length > 1;
    const matrix = best.find(isMatrix);
    // A guess is worth something when it explains every layer that the bias is used by.
    const uses = sum(best, (claim) => claim.uses.length);
    const isWeak = evidence === EVIDENCE.guessed && uses !== best[0]!.shared;
    const winner = isWeak ? undefined : tied ? matrix : best[0];
    const candidates = winner ? candidatesOf(winner, some, tied) : [];
    settled.set(name, { winner, tied: tied && matrix !== undefined && !isWeak, candidates });
  }
  // The second call of a module, by the name that the exporter gives it.
  for (const claim of claims) {
    if (!claim.name.endsWith(".weight") || claim.evidence > EVIDENCE.used || !isMatrix(claim)) continue;
    for (const path of variants(claim.name.slice(0, -".weight".length)).slice(1)) {
      const { winner, candidates } = settled.get(`${path}.weight`) ?? {};
      if (winner && isSameMatrix(winner, claim)) candidates?.push({ ...storedOf(claim), equal: false });
    }
  }
  return settled;
}

function candidatesOf(winner: Claim, claims: readonly Claim[], tied: boolean): Candidate[] {
  return claims.flatMap((claim) => {
    // No vector is a matrix' rival: quantisers write the scales of its columns at the same place.
    const equal = tied && claim.evidence === winner.evidence && (!isMatrix(winner) || isMatrix(claim));
    return claim !== winner && (equal || isSameMatrix(winner, claim)) ? [{ ...storedOf(claim), equal }] : [];
  });
}

/** [out, in] of a parameter that is the weight of a linear layer; undefined when its dimensions do not tell. */
export function matrixShape(
  stored: Pick<Stored, "shape" | "layout" | "uses" | "slice" | "joined">,
): readonly [out: number, inputs: number] | undefined {
  const { shape, layout, uses, slice, joined } = stored;
  // Checked when they were joined.
  if (joined) return joined.map((part) => matrixShape(part)!).reduce(([out, inputs], [more]) => [out + more, inputs]);
  const blocks = uses.find(({ node }) => node.opType === "MatMulNBits")?.node;
  if (!blocks && shape.length !== 2) return undefined;
  const [rows, columns] = blocks ? [intOf(blocks, "N"), intOf(blocks, "K")] : (shape as [number, number]);
  const [out, inputs] = !blocks && layout === "in-out" ? [columns, rows] : [rows, columns];
  return [slice ? slice.sizes[slice.index]! : out, inputs];
}

export function partSize(stored: Stored): number {
  const { slice, shape } = stored;
  if (shape.length === 1) return slice ? slice.sizes[slice.index]! : shape[0]!;
  return matrixShape(stored)![0];
}

/** Index of the first output of a part of a packed parameter; 0 for other parameters. */
export function partStart({ slice }: Stored): number {
  return slice ? sum(slice.sizes.slice(0, slice.index)) : 0;
}

/** Rows or columns of a parameter, from `from` on, that lie in a parameter of the file, from `at` on. */
interface PartInFile {
  readonly name: string;
  readonly initializer: string;
  readonly at: number;
  readonly from: number;
  readonly count: number;
}

/** Parts of the file that a parameter is made of, or the part that it is. */
export function partsOf({ joined, ...parameter }: OnnxParameter): PartInFile[] {
  let from = 0;
  return (joined ?? [parameter]).map((part) => {
    const count = partSize(part);
    from += count;
    const { name, initializer, slice } = part;
    return { name: slice?.of ?? name, initializer, at: partStart(part), from: from - count, count };
  });
}

export function outputAxis({ shape, layout }: Pick<Stored, "shape" | "layout">): number {
  return shape.length === 2 && layout === "in-out" ? 1 : 0;
}

/** The shape that a parameter has as one of its own. */
export function pieceShape(stored: Stored): readonly number[] {
  const axis = outputAxis(stored);
  return stored.slice ? stored.shape.map((size, i) => (i === axis ? partSize(stored) : size)) : stored.shape;
}

/**
 * A weight as the matrix [out, in] that it is to its module: convolutions are [out, …], tables lie the other way round.
 */
export function asMatrix<T extends Stored>(stored: T): T {
  const { shape, layout } = stored;
  if (shape.length > 2) return { ...stored, shape: [shape[0]!, elementsOf(shape.slice(1))], layout: "out-in" };
  return layout === "embedding" ? { ...stored, layout: "in-out" } : stored;
}

export function isMatrix(stored: Stored): boolean {
  return (stored.layout === "in-out" || stored.layout === "out-in") && matrixShape(stored) !== undefined;
}

/** True if it is a float matrix that goes by an exporter's name, so that any layer may be its own. */
export function isNameless(parameter: OnnxParameter): boolean {
  const { name, initializer, dtype } = parameter;
  return name === initializer && !isParameterName(name) && dtype !== "other" && isMatrix(parameter);
}

function isSameMatrix(a: Stored, b: Stored): boolean {
  return isMatrix(a) && isMatrix(b) && sameShape(matrixShape(a)!, matrixShape(b)!);
}

// Finds which parameters of the PyTorch model an initializer may be, from its own name and from the modules that use
// it. Looks at names and orientation only: it reads no value, and does not decide between two claims to one name.

/** Operators that pass their first input on, as it is or transposed. */
const PASSES = new Set(["Cast", "CastLike", "Identity", "Transpose", "QuantizeLinear", "DequantizeLinear"]);

/** Operators whose second input is a weight and whose third a bias. */
const NORMS = new Set([
  "BatchNormalization",
  "ConvTranspose",
  "GroupNormalization",
  "InstanceNormalization",
  "LayerNormalization",
  "RMSNormalization",
  "SimplifiedLayerNormalization",
]);

/** Index of the bias in operators of onnxruntime's optimiser; their first input is the result of the biased layer. */
export const SUMS: Readonly<Record<string, number>> = {
  BiasGelu: 1,
  FastGelu: 1,
  SkipLayerNormalization: 4,
  SkipSimplifiedLayerNormalization: 3,
};

/** Words that tools append to the name of a parameter they have changed. */
const MADE_BY_TOOLS = /^(quantized|fp16|f16|bf16|Transposed|Q[248](G\d+)?)$/;

/** Evidence for a name, weakest first. If several initializers claim one name, the best evidence decides. */
const EVIDENCE = {
  nothing: 0,
  /** The name of the bias behind the layer, which other layers use too: it may have been merged. */
  guessed: 1,
  /** The initializer's own name, though all its uses are in other modules: a leftover of merged parameters. */
  namedElsewhere: 2,
  /** The module that uses the initializer. */
  used: 3,
  /** The initializer's own name, and no use contradicts it. */
  named: 4,
} as const;

interface Claim extends Stored {
  readonly name: string;
  evidence: number;
  layout: Layout | undefined;
  readonly uses: Use[];
  /** Layers that use the bias this name was inferred from; more than one makes it a guess. */
  shared: number;
}

/** Most segments of a module's name that are looked at, since a file may contain any names. */
const MOST_SEGMENTS = 64;

/** Most operators in a row that a value is followed through. Exporters and quantisers write three. */
export const MOST_PASSED = 16;

/**
 * Most uses that are followed, for each use in the graph: nested graphs may reuse names of values and so multiply them.
 */
const MOST_FOLLOWED = 32;

interface ModulePath {
  readonly path: string;
  /** Number of layers that use the bias this path was inferred from; more than one makes it a guess. */
  readonly shared: number;
}

class Claims {
  readonly #graph: Graph;
  readonly #file: string;
  /** True if the names follow onnxruntime-genai's model builder. */
  readonly #built: boolean;
  readonly #paths = new Map<NodeProto, ModulePath | undefined>();
  readonly #segments = new Map<string, readonly string[]>();
  #left = 100_000;

  constructor({ graph, name, proto }: OnnxModel) {
    this.#graph = graph;
    this.#file = name;
    this.#built = proto.producerName === "onnxruntime-genai";
    for (const uses of graph.consumers.values()) this.#left += MOST_FOLLOWED * uses.length;
  }

  /** Names supported by an initializer's own name and its uses: at least one. */
  of(initializer: string, type: OnnxTensorType): Claim[] {
    const rank = type.shape.length;
    const claims = new Map<string, Claim>();
    const within = new Map<string, Claim>();
    const own = this.#asCheckpoint(ownName(initializer));
    const reached = this.#reach(initializer, own);
    const claim = (name: string, evidence: number, layout: Layout | undefined, use?: Use, shared = 1): void => {
      let found = claims.get(name);
      if (!found) {
        claims.set(name, (found = { name, evidence, initializer, ...type, layout, uses: [], shared }));
        if (reached.length > 1) this.#index(found, within);
      }
      found.evidence = Math.max(found.evidence, evidence);
      found.layout ??= layout;
      if (use) found.uses.push(use);
    };
    for (const { use, name, transposed } of reached) {
      const role = roleOf(use, rank, transposed);
      const place = this.#modulePathOf(use.node);
      const path = place?.path;
      if (name !== undefined && (!role || path === undefined || this.#isWithin(name, path))) {
        claim(name, EVIDENCE.named, role?.layout, use);
      } else if (role && path) {
        const again = variants(path).flatMap((variant) => within.get(`${role.suffix} ${variant}`) ?? [])[0];
        const evidence = place.shared === 1 ? EVIDENCE.used : EVIDENCE.guessed;
        claim(again?.name ?? `${path}.${role.suffix}`, evidence, role.layout, use, place.shared);
      } else {
        claim(initializer, EVIDENCE.nothing, role?.layout, use);
      }
    }
    // Own names are kept even if every use is in another module.
    for (const { use, name, transposed } of reached) {
      if (name === undefined || (claims.get(name)?.evidence ?? 0) > EVIDENCE.namedElsewhere) continue;
      claim(name, EVIDENCE.namedElsewhere, roleOf(use, rank, transposed)?.layout, use);
    }
    if (claims.size === 0) claim(own ?? initializer, own === undefined ? EVIDENCE.nothing : EVIDENCE.named, undefined);
    return [...claims.values()];
  }

  #asCheckpoint(name: string | undefined): string | undefined {
    return this.#built && name !== undefined ? unbuilt(name) : name;
  }

  /** Indexes a claim under each module that contains it. */
  #index(claim: Claim, within: Map<string, Claim>): void {
    const segments = this.#split(claim.name);
    const suffix = segments[segments.length - 1]!;
    for (let depth = 1; depth < Math.min(segments.length, MOST_SEGMENTS); depth++) {
      const key = `${suffix} ${segments.slice(0, depth).join(".")}`;
      if (!within.has(key)) within.set(key, claim);
    }
  }

  /** Uses of an initializer, also behind operators that only pass it on, and the checkpoint's name, if it was kept. */
  #reach(initializer: string, name: string | undefined) {
    const reached: { readonly use: Use; readonly name: string | undefined; readonly transposed: boolean }[] = [];
    const values = [{ value: initializer, name, transposed: false, passed: 0 }];
    // Nested graphs may reuse a name of the graph around them, which would lead round in circles in a hostile file.
    const seen = new Set([initializer]);
    for (const { value, name, transposed, passed } of values) {
      for (const use of this.#graph.consumers.get(value) ?? []) {
        if (--this.#left < 0) {
          const message = "its nested graphs name their values alike, so that none can be told: export the model again";
          throw new FormatError(message, { file: this.#file, part: `initializer ${initializer}` });
        }
        const { node, input } = use;
        const output = node.output[0];
        if (input !== 0 || !PASSES.has(node.opType) || output === undefined || passed === MOST_PASSED) {
          reached.push({ use, name, transposed });
        } else if (!seen.has(output)) {
          seen.add(output);
          // Tools lengthen names: of NAME_f16 and NAME the shorter one is the checkpoint's. A different name behind an
          // Identity belongs to a merged parameter.
          const renamed = isParameterName(output) && !(name !== undefined && output.startsWith(name));
          const turns = node.opType === "Transpose" && turnsMatrix(node);
          values.push({
            value: output,
            name: renamed ? output : name,
            transposed: transposed !== turns,
            passed: passed + 1,
          });
        }
      }
    }
    return reached;
  }

  #modulePathOf(node: NodeProto): ModulePath | undefined {
    if (!this.#paths.has(node)) {
      const place = modulePathOf(this.#graph, node);
      this.#paths.set(node, place && { ...place, path: this.#asCheckpoint(place.path)! });
    }
    return this.#paths.get(node);
  }

  #split(name: string): readonly string[] {
    const segments = this.#segments.get(name) ?? name.split(".");
    this.#segments.set(name, segments);
    return segments;
  }

  /**
   * True if a parameter belongs to the module at `path` or to one inside it. The TorchScript exporter numbers the calls
   * of a module that runs more than once: the second call of "layer.query" is "layer.query_1".
   */
  #isWithin(name: string, path: string): boolean {
    if (path === "") return true;
    const segments = this.#split(name);
    return this.#split(path).every((segment, i) => {
      const own = segments[i];
      return own !== undefined && i < segments.length - 1 && (segment === own || unnumbered(segment) === own);
    });
  }
}

/** Paths of the modules that a path may be a call of: the path itself, and without the numbers of repeated calls. */
function variants(path: string): string[] {
  const segments = path.split(".", MOST_SEGMENTS + 1);
  if (segments.length > MOST_SEGMENTS) return [path];
  const found = new Set([path, segments.map(unnumbered).join(".")]);
  for (const [i, segment] of segments.entries()) {
    if (unnumbered(segment) !== segment) found.add(segments.with(i, unnumbered(segment)).join("."));
  }
  return [...found];
}

/** Drops the number of a repeated call: "query" from "query_1". */
function unnumbered(segment: string): string {
  const at = segment.lastIndexOf("_");
  return at > 0 && /^\d+$/.test(segment.slice(at + 1)) ? segment.slice(0, at) : segment;
}

/**
 * Translates the model builder's names to transformers': "layers.0.attn.q_proj.MatMul.weight" is
 * "layers.0.self_attn.q_proj.weight".
 */
function unbuilt(name: string): string {
  return name
    .replace(/\.(?:MatMul|Add|layernorm)\.(weight|bias)$/, ".$1")
    .replace(/\.layers\.(\d+)\.attn\./, ".layers.$1.self_attn.")
    .replace(/\.layers\.\d+\.final_norm_layernorm\b/, ".norm");
}

/** The checkpoint's name within an initializer's name, which tools lengthen. */
function ownName(initializer: string): string | undefined {
  let end = initializer.length;
  for (let at = initializer.lastIndexOf("_"); at > 0; at = initializer.lastIndexOf("_", end - 1)) {
    const word = initializer.slice(at + 1, end);
    // "NAME.weight_T" is NAME's weight, transposed.
    if (!MADE_BY_TOOLS.test(word) && !(word === "T" && initializer.endsWith(".weight", at))) break;
    end = at;
  }
  const stem = initializer.slice(0, end);
  return isParameterName(stem) ? stem : undefined;
}

/**
 * True if a name can be a checkpoint's. Exporters make up names like "onnx::MatMul_20", "val_3" and
 * "/a/b/Add_output_0".
 */
export function isParameterName(name: string): boolean {
  return name.includes(".") && !/[/:]/.test(name);
}

/** True if a Transpose swaps the dimensions of a matrix; without `perm` it reverses them. */
function turnsMatrix(node: NodeProto): boolean {
  const perm = intsOf(node, "perm");
  return perm === undefined || (perm.length === 2 && perm[0] === 1);
}

interface Role {
  suffix: "weight" | "bias";
  layout?: Layout | undefined;
}

function roleOf({ node, input }: Use, rank: number, transposed: boolean): Role | undefined {
  const matrix = (layout: "in-out" | "out-in"): Role => {
    const turned = layout === "in-out" ? "out-in" : "in-out";
    return { suffix: "weight", layout: rank !== 2 ? undefined : transposed ? turned : layout };
  };
  switch (node.opType) {
    case "MatMul":
    case "MatMulInteger":
    case "FusedMatMul":
      if (input > 1) return undefined;
      return matrix(input === 0 || intOf(node, "transB") ? "out-in" : "in-out");
    case "QLinearMatMul":
      return input === 3 ? matrix("in-out") : undefined;
    case "MatMulNBits":
      // [out, blocks, bytes]: packed along the rows of an out-in weight.
      return input === 1 ? { suffix: "weight", layout: "out-in" } : undefined;
    case "Gemm":
      if (input === 1) return matrix(intOf(node, "transB") ? "out-in" : "in-out");
      return input === 2 ? { suffix: "bias" } : undefined;
    case "Conv":
    case "ConvInteger":
      if (input === 1) return { suffix: "weight", layout: "conv" };
      return input === 2 && node.opType === "Conv" ? { suffix: "bias" } : undefined;
    case "Gather":
    case "GatherBlockQuantized":
      if (input !== 0 || rank !== 2 || intOf(node, "axis")) return undefined;
      return { suffix: "weight", layout: transposed ? undefined : "embedding" };
    case "Add":
      return rank === 1 ? { suffix: "bias" } : undefined;
    case "Mul":
      return rank === 1 ? { suffix: "weight" } : undefined;
    case "EmbedLayerNormalization":
      // Tables of tokens, positions and segments; then scale and shift.
      if (input >= 2 && input <= 4) return { suffix: "weight", layout: rank === 2 ? "embedding" : undefined };
      return input === 5 ? { suffix: "weight" } : input === 6 ? { suffix: "bias" } : undefined;
    case "BiasGelu":
    case "FastGelu":
    case "SkipLayerNormalization":
    case "SkipSimplifiedLayerNormalization":
      if (input === SUMS[node.opType]) return { suffix: "bias" };
      return input === 2 ? { suffix: "weight" } : input === 3 ? { suffix: "bias" } : undefined;
    default:
      if (!NORMS.has(node.opType)) return undefined;
      return input === 1 ? { suffix: "weight" } : input === 2 ? { suffix: "bias" } : undefined;
  }
}

/** Metadata key under which the dynamo exporter writes the modules around a node. */
export const SCOPES = "pkg.torch.onnx.name_scopes";

/**
 * The module whose `forward` made a node, as the exporter wrote it: dynamo into the node's metadata, TorchScript into
 * its name.
 */
function writtenPath({ name, metadataProps }: NodeProto): string | undefined {
  const scopes = metadataProps.find(({ key }) => key === SCOPES)?.value;
  // A Python list of modules from the outermost in, then the operator: ['', 'encoder', 'encoder.query', 'linear'].
  if (scopes !== undefined) return [...scopes.matchAll(/'([^']*)'/g)].at(-2)?.[1];
  return name.startsWith("/") ? name.slice(1, name.lastIndexOf("/")).replaceAll("/", ".") : undefined;
}

/**
 * The module whose `forward` made a node, dotted; "" for the model itself. If no exporter wrote it, or it is lost, the
 * name of a linear layer's bias often tells. A bias that several layers use is no proof: one layer may run twice, or
 * equal biases were merged.
 */
export function modulePathOf(graph: Graph, node: NodeProto): ModulePath | undefined {
  const path = writtenPath(node);
  if (path !== undefined) return { path, shared: 1 };
  let result = /^(Fused)?MatMul(NBits|Integer)?$/.test(node.opType) ? node.output[0] : undefined;
  // A Cast, and a Mul by the scales, come first.
  for (let i = 0; i < 2 && node.opType === "MatMulInteger"; i++)
    result = graph.consumers.get(result ?? "")?.[0]?.node.output[0];
  for (const { node: next } of graph.consumers.get(result ?? "") ?? []) {
    const fused = SUMS[next.opType];
    const bias = next.opType === "Add" ? next.input.find((value) => value !== result) : next.input[fused ?? -1];
    if (!bias?.endsWith(".bias") || !isParameterName(bias)) continue;
    return { path: bias.slice(0, -".bias".length), shared: graph.consumers.get(bias)!.length };
  }
  return undefined;
}
