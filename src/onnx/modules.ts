/**
 * Which parameter of the PyTorch model each initializer of its export is. Exporters keep some names and lose others,
 * and merge parameters of equal values; what they lose is found again from where in the model an initializer is used.
 * Names and orientation only: nothing here reads a value.
 */
import type { Layout } from "../format/format.ts";
import { attribute, type Graph, type OnnxModel, type Use } from "./model.ts";
import type { NodeProto } from "./onnx_pb.ts";
import { type OnnxTensorType, tensorType } from "./tensors.ts";

/** A parameter of the model, and the initializer that holds it. */
export interface OnnxParameter extends OnnxTensorType {
  /** As in the checkpoint, as far as the file tells; where it tells nothing, the initializer's own name. */
  readonly name: string;
  readonly initializer: string;
  /** How a weight lies in the initializer. Absent for vectors and where the use does not tell. */
  readonly layout?: Layout;
  /** The other parameters in the same initializer: before one of them changes alone, it needs a copy of its own. */
  readonly sharedBy: readonly string[];
  /** Where it enters the computation, behind Cast, Identity, Transpose and the like. Empty when nothing uses it. */
  readonly uses: readonly Use[];
}

/** Operators that hand their first input on as it is, or turned. */
const PASSES = new Set(["Cast", "CastLike", "Identity", "Transpose", "QuantizeLinear", "DequantizeLinear"]);

/** Normalisations with a weight as second and a bias as third input. */
const NORMS = new Set([
  "BatchNormalization",
  "GroupNormalization",
  "InstanceNormalization",
  "LayerNormalization",
  "RMSNormalization",
  "SimplifiedLayerNormalization",
]);

/** `TensorProto.DataType` of quantised weights: (u)int8, float8, (u)int4, float4, (u)int2. */
const QUANTISED = new Set([2, 3, 17, 18, 19, 20, 21, 22, 23, 25, 26]);

/** What speaks for a name. Of several initializers that claim one name, the better evidence decides. */
const NOTHING = 0;
/** The initializer's name, though all its uses are in other modules: left over from parameters that were merged. */
const NAMED_ELSEWHERE = 1;
/** The module that uses it. */
const USED = 2;
/** The initializer's name, and no use that contradicts it. */
const NAMED = 3;

interface Claim {
  name: string;
  evidence: number;
  initializer: string;
  layout: Layout | undefined;
  uses: Use[];
}

/**
 * The model's float parameters and quantised weights. One that was merged with others of equal values is listed under
 * each name, with the others in `sharedBy`.
 * @throws FormatError when an initializer's shape is impossible
 */
export function findParameters(model: OnnxModel): OnnxParameter[] {
  const { graph } = model;
  const types = new Map<string, OnnxTensorType>();
  const claims: Claim[] = [];
  for (const [initializer, tensor] of graph.initializers) {
    const type = tensorType(tensor, model.name);
    if (type.dtype === "other" && !QUANTISED.has(tensor.dataType) && !isDequantised(graph, initializer)) continue;
    types.set(initializer, type);
    for (const claim of claimsOf(graph, initializer, type)) claims.push(claim);
  }

  const won = settle(claims);
  const parameters: OnnxParameter[] = [];
  for (const [initializer, type] of types) {
    const mine = won.get(initializer) ?? [];
    for (const { name, layout, uses } of mine) {
      const sharedBy = mine.map((other) => other.name).filter((other) => other !== name);
      parameters.push({ name, initializer, ...type, ...(layout ? { layout } : {}), sharedBy, uses });
    }
  }
  return parameters;
}

/** Whether integers are a parameter's: a bias of a quantised layer is int32, as much else is. */
function isDequantised(graph: Graph, initializer: string): boolean {
  const uses = graph.consumers.get(initializer) ?? [];
  return uses.some(({ node, input }) => node.opType === "DequantizeLinear" && input === 0);
}

/** The claims that stand, by initializer: of those to one name the best founded, or none where two are equally so. */
function settle(claims: readonly Claim[]): Map<string, Claim[]> {
  const best = new Map<string, Claim | undefined>();
  const evidence = new Map<string, number>();
  for (const claim of claims) {
    const known = evidence.get(claim.name) ?? -1;
    if (claim.evidence > known) best.set(claim.name, claim);
    // Neither is safe to write to under this name; under their own names they still can be told apart.
    else if (claim.evidence === known) best.set(claim.name, undefined);
    evidence.set(claim.name, Math.max(known, claim.evidence));
  }
  const won = new Map<string, Claim[]>();
  const keep = (claim: Claim): void => {
    const mine = won.get(claim.initializer);
    if (mine) mine.push(claim);
    else won.set(claim.initializer, [claim]);
  };
  for (const claim of best.values()) if (claim) keep(claim);
  for (const claim of claims) {
    if (!won.has(claim.initializer) && !best.get(claim.initializer)) keep({ ...claim, name: claim.initializer });
  }
  return won;
}

/** The names that an initializer's own name and its uses speak for: at least one. */
function claimsOf(graph: Graph, initializer: string, { shape }: OnnxTensorType): Claim[] {
  const claims: Claim[] = [];
  const claim = (name: string, evidence: number, layout: Layout | undefined, use?: Use): void => {
    let found = claims.find((candidate) => candidate.name === name);
    if (!found) claims.push((found = { name, evidence, initializer, layout, uses: [] }));
    found.evidence = Math.max(found.evidence, evidence);
    found.layout ??= layout;
    if (use) found.uses.push(use);
  };
  const stem = initializer.replace(/(_(quantized|fp16|f16|bf16|Transposed|Q[248](G\d+)?))+$/, "");
  const own = isParameterName(stem) ? stem : undefined;
  const reached = reach(graph, initializer, own);
  for (const { use, name, transposed } of reached) {
    const role = roleOf(use, shape.length, transposed);
    const path = modulePath(graph, use.node);
    if (name !== undefined && (!role || path === undefined || isWithin(name, path))) {
      claim(name, NAMED, role?.layout, use);
    } else if (role && path) {
      const derived = `${path}.${role.suffix}`;
      const again = claims.find((earlier) => isWithin(earlier.name, path) && earlier.name.endsWith(`.${role.suffix}`));
      claim(again?.name ?? derived, USED, role.layout, use);
    } else {
      claim(initializer, NOTHING, role?.layout, use);
    }
  }
  // Names that were kept though every use is in another module.
  for (const { use, name, transposed } of reached) {
    const used = claims.some((claimed) => claimed.name === name && claimed.evidence > NAMED_ELSEWHERE);
    if (name !== undefined && !used) claim(name, NAMED_ELSEWHERE, roleOf(use, shape.length, transposed)?.layout, use);
  }
  if (claims.length === 0) claim(own ?? initializer, own === undefined ? NOTHING : NAMED, undefined);
  return claims;
}

interface Reached {
  use: Use;
  /** The checkpoint's name, where one was kept. */
  name: string | undefined;
  transposed: boolean;
}

/** Where an initializer is used, looked for through the operators that only hand it on. `name` is its own. */
function reach(graph: Graph, initializer: string, name: string | undefined): Reached[] {
  const reached: Reached[] = [];
  const values = [{ value: initializer, name, transposed: false }];
  // Nested graphs may name a value as the graph around them does: without this a hostile file leads round in circles.
  const seen = new Set([initializer]);
  for (const { value, name, transposed } of values) {
    for (const use of graph.consumers.get(value) ?? []) {
      const { node, input } = use;
      const output = node.output[0];
      if (input !== 0 || !PASSES.has(node.opType) || output === undefined) {
        reached.push({ use, name, transposed });
      } else if (!seen.has(output)) {
        seen.add(output);
        // Tools lengthen names: of NAME_f16 and NAME the shorter is the checkpoint's. Another name altogether is that of
        // a merged parameter, behind an Identity.
        const renamed = isParameterName(output) && !(name !== undefined && output.startsWith(name));
        const turns = node.opType === "Transpose" && turnsMatrix(node);
        values.push({ value: output, name: renamed ? output : name, transposed: transposed !== turns });
      }
    }
  }
  return reached;
}

/** Whether a Transpose turns a matrix; without `perm` it reverses the dimensions. */
function turnsMatrix(node: NodeProto): boolean {
  const perm = attribute(node, "perm")?.ints;
  return perm === undefined || (perm.length === 2 && perm[0] === 1n);
}

/** Whether a name can be a checkpoint's. Exporters' own are like "onnx::MatMul_20", "val_3" and "/a/b/Add_output_0". */
function isParameterName(name: string): boolean {
  return name.includes(".") && !/[/:]/.test(name);
}

interface Role {
  suffix: "weight" | "bias";
  layout?: Layout | undefined;
}

/** What an initializer of this rank is to the node that uses it. */
function roleOf({ node, input }: Use, rank: number, transposed: boolean): Role | undefined {
  const matrix = (layout: "in-out" | "out-in"): Role => {
    const turned = layout === "in-out" ? "out-in" : "in-out";
    return { suffix: "weight", layout: rank !== 2 ? undefined : transposed ? turned : layout };
  };
  switch (node.opType) {
    case "MatMul":
    case "MatMulInteger":
      return input === 1 ? matrix("in-out") : input === 0 ? matrix("out-in") : undefined;
    case "QLinearMatMul":
      return input === 3 ? matrix("in-out") : undefined;
    case "MatMulNBits":
      // [out, blocks, bytes]: packed along the rows of an out-in weight.
      return input === 1 ? { suffix: "weight", layout: "out-in" } : undefined;
    case "Gemm":
      if (input === 1) return matrix(attribute(node, "transB")?.i ? "out-in" : "in-out");
      return input === 2 ? { suffix: "bias" } : undefined;
    case "Conv":
    case "ConvInteger":
      if (input === 1) return { suffix: "weight", layout: "conv" };
      return input === 2 && node.opType === "Conv" ? { suffix: "bias" } : undefined;
    case "ConvTranspose":
      return input === 1 ? { suffix: "weight" } : input === 2 ? { suffix: "bias" } : undefined;
    case "Gather":
      if (input !== 0 || rank !== 2 || attribute(node, "axis")?.i) return undefined;
      return { suffix: "weight", layout: transposed ? undefined : "embedding" };
    case "Add":
      return rank === 1 ? { suffix: "bias" } : undefined;
    case "Mul":
      return rank === 1 ? { suffix: "weight" } : undefined;
    default:
      if (!NORMS.has(node.opType)) return undefined;
      return input === 1 ? { suffix: "weight" } : input === 2 ? { suffix: "bias" } : undefined;
  }
}

/**
 * The module whose `forward` made a node, dotted; "" for the model itself. The dynamo exporter writes it into the
 * node's metadata, the TorchScript exporter into its name. Where both are lost, a linear layer's bias often still has
 * its name.
 */
function modulePath(graph: Graph, node: NodeProto): string | undefined {
  const scopes = node.metadataProps.find(({ key }) => key === "pkg.torch.onnx.name_scopes")?.value;
  // A Python list of the modules from the outermost in, then the operator: ['', 'encoder', 'encoder.query', 'linear'].
  if (scopes !== undefined) return [...scopes.matchAll(/'([^']*)'/g)].at(-2)?.[1];
  if (node.name.startsWith("/")) return node.name.slice(1, node.name.lastIndexOf("/")).replaceAll("/", ".");
  if (node.opType !== "MatMul") return undefined;
  for (const { node: next } of graph.consumers.get(node.output[0] ?? "") ?? []) {
    const bias = next.opType === "Add" ? next.input.find((value) => value !== node.output[0]) : undefined;
    if (bias?.endsWith(".bias") && isParameterName(bias) && graph.consumers.get(bias)!.length === 1) {
      return bias.slice(0, -".bias".length);
    }
  }
  return undefined;
}

/**
 * Whether a parameter belongs to the module at `path` or to one inside it. The TorchScript exporter numbers the calls
 * of a module that runs more than once: the second call of "layer.query" is "layer.query_1".
 */
function isWithin(name: string, path: string): boolean {
  if (path === "") return true;
  const segments = name.split(".");
  return path.split(".").every((segment, i) => {
    const own = segments[i];
    if (own === undefined || i === segments.length - 1) return false;
    return segment === own || (segment.startsWith(`${own}_`) && /^\d+$/.test(segment.slice(own.length + 1)));
  });
}
