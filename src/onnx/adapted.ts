/** Layers and parameters of a model that tasks change, and the inputs that carry a task to them. */
import type { Components } from "./components.ts";
import type { Form, GraftVector } from "./forms.ts";
import type { Linear } from "./linear.ts";
import type { Slice } from "./modules.ts";
import type { Added } from "./nodes.ts";
import type { GraphProto, NodeProto } from "./onnx_pb.ts";

/** A layer of the model that gets a term: the one record of it between a pack's module and the inputs of the graph. */
export interface AdaptedLayer {
  /** The pack's name of the module, and its sizes. */
  readonly name: string;
  readonly in: number;
  readonly out: number;
  /** Each application of the weight; none where the layer is not linear. */
  readonly linears: readonly Linear[];
  /** Set where it is no linear layer. */
  readonly form?: Form | undefined;
  /** Components for a core between them. */
  readonly components?: Components | undefined;
  /** Whether tasks bring factors: expanded ones, or private ones beside a core. True without components. */
  readonly factors: boolean;
  /** Whether tasks scale the rows of W + ΔW (DoRA). */
  readonly rowScale: boolean;
}

/** A bias that tasks change, of any layer: the change is added to what the node makes. */
export interface GraftBias {
  /** Of the parameter. */
  readonly name: string;
  readonly size: number;
  readonly type: number;
  readonly places: readonly { graph: GraphProto; node: NodeProto }[];
  /** Where it is a part of what the nodes add. */
  readonly slice?: Slice | undefined;
}

/**
 * Rows of an embedding that tasks replace. Where an index is met, y' = (1 − s)·y + s·row, with the strength s behind the
 * values of the row: so the base's rows need not be known.
 */
export interface GraftRows {
  /** Of the parameter. */
  readonly name: string;
  readonly width: number;
  readonly type: number;
  /** Gather nodes. */
  readonly places: readonly { graph: GraphProto; node: NodeProto }[];
}

/** A layer that each task brings whole, with a number of outputs of its own. */
export interface GraftHead {
  /** Of the module. */
  readonly name: string;
  readonly in: number;
  readonly out: number;
  readonly bias: boolean;
  /** `end` makes the layer's result, bias included. */
  readonly places: readonly { linear: Linear; end: NodeProto }[];
}

export interface Graft {
  readonly modules: readonly AdaptedLayer[];
  readonly biases: readonly GraftBias[];
  readonly rows: readonly GraftRows[];
  readonly heads: readonly GraftHead[];
  readonly vectors: readonly GraftVector[];
}

/** An input that was added: f32, or int64 for `indices`. A string in `dims` is a free dimension. */
export interface TaskInput {
  readonly name: string;
  /** Module or parameter that it belongs to; of a core the modules that share it, joined by "+". */
  readonly of: string;
  readonly kind: "core" | "A" | "B" | "scale" | "bias" | "indices" | "rows" | "headWeight" | "headBias";
  readonly dims: readonly (number | string)[];
  /** Of a core: the modules' own, along the diagonal in this order. */
  readonly cores?: readonly CoreBlock[];
}

/** The core of one module in the input of several. */
export interface CoreBlock {
  readonly module: string;
  readonly KA: number;
  readonly KB: number;
  /** What rows and columns are multiplied with, where the graph holds integers. */
  readonly scalesA: Float32Array | undefined;
  readonly scalesB: Float32Array | undefined;
}

/** What `graft` made of the model. */
export interface Grafted {
  readonly inputs: readonly TaskInput[];
  readonly initializers: readonly Added[];
  /** Of the first adapted layer in the main graph: what enters it and the term, as graph outputs for a probe. */
  readonly probe: ProbeOutputs | undefined;
  /** The same of the first of each kind that is no linear layer. */
  readonly formProbes: readonly FormProbe[];
}

/** Values of one adapted layer that are outputs of the graph: x, f32 rows of [in], and the term, f32 rows of [out]. */
export interface ProbeOutputs {
  readonly module: string;
  readonly x: string;
  readonly term: string;
}

/** Outputs for the probe of the first module of a kind: what enters as the model has it, and the term, f32. */
export interface FormProbe {
  /** "weight": of a normalisation; `module` is the parameter. */
  readonly kind: Form["kind"] | "weight";
  readonly module: string;
  readonly x: string;
  readonly term: string;
  /** A convolution's attributes, and its kernel as in `shape`: [out, channels, …]. */
  readonly shape: readonly number[];
  readonly strides: readonly number[];
  readonly dilations: readonly number[];
  readonly pads: readonly number[];
  readonly autoPad: string;
}
