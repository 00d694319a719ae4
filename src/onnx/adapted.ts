/** Layers and parameters of a model that tasks change, and the inputs that carry a task to them. */
import type { Components, IntegerProducts } from "./components.ts";
import type { Form, GraftVector } from "./forms.ts";
import type { Linear } from "./linear.ts";
import type { Slice } from "./modules.ts";
import type { Added } from "./nodes.ts";
import type { GraphProto, NodeProto } from "./protobuf.ts";

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
  /** Components that rows of the factors are coefficients over, on the sides where they are. */
  readonly over?: Partial<Components> | undefined;
  /** Whether a task's factors may have to be made of components: where no core and no coefficients stand for them. */
  readonly expands?: boolean | undefined;
  /** Whether tasks scale the rows of W + ΔW (DoRA). */
  readonly rowScale: boolean;
}

/** A bias that tasks change, of any layer: the change is added to the node's result. */
export interface GraftBias {
  /** Name of the parameter. */
  readonly name: string;
  readonly size: number;
  readonly type: number;
  readonly places: readonly { graph: GraphProto; node: NodeProto }[];
  /** Set where it is a part of the vector that the nodes add. */
  readonly slice?: Slice | undefined;
}

/**
 * Rows of an embedding that tasks replace, or of a linear layer's weight, which has one for each output. Where an index is met,
 * y' = (1 − s)·y + s·row, and at the output of a linear layer y' = (1 − s)·y + s·x·row, with the strength s behind the values of the row:
 * so the base's rows need not be known.
 */
export interface GraftRows {
  /** Name of the parameter. */
  readonly name: string;
  /** How many rows the parameter has, and how many numbers each. */
  readonly count: number;
  readonly width: number;
  readonly type: number;
  /** Gather nodes. */
  readonly places: readonly { graph: GraphProto; node: NodeProto }[];
  /** Applications of a linear layer. */
  readonly linears: readonly Linear[];
  /** The pack's name of an embedding that the parameter is tied to: its rows are taken where a task has none for this one. */
  readonly follows?: string | undefined;
}

/** A layer that each task brings whole, with a number of outputs of its own. */
export interface GraftHead {
  /** Name of the module. */
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

/** How a graft is made. */
export interface GraftOptions {
  /** Whether it adds outputs for a probe. Default: true. */
  readonly probe?: boolean | undefined;
  /** Operators for components that are integers. Default: none, they become floats. */
  readonly integers?: IntegerProducts | undefined;
  /** Whether cores come in as few inputs as can be. Default: false: a split into many parts is more than some devices bind at once. */
  readonly join?: boolean | undefined;
}

/** An input that was added: f32, or int64 for `indices`. A string in `dims` is a free dimension. */
export interface TaskInput {
  readonly name: string;
  /** Module or parameter that it belongs to; modules that share an input are joined by "+". */
  readonly of: string;
  readonly kind: "core" | "A" | "B" | "scale" | "bias" | "indices" | "rows" | "headWeight" | "headBias";
  readonly dims: readonly (number | string)[];
  /** Cores of the modules in it; zeros lie beside them. */
  readonly cores?: readonly CoreBlock[];
  /** Set where a factor's rows are coefficients over components, which the graph has: of A [K, q], of B [q, K]. */
  readonly over?: { readonly K: number; readonly scales: Float32Array | undefined } | undefined;
}

/** The core of one module in the input of several. */
export interface CoreBlock {
  readonly module: string;
  /** Place of its first number. */
  readonly row: number;
  readonly column: number;
  readonly KA: number;
  readonly KB: number;
  /** Factors of rows and columns, where the graph holds integers. */
  readonly scalesA: Float32Array | undefined;
  readonly scalesB: Float32Array | undefined;
}

/** Inputs, initializers and outputs that `graft` has added to a model. */
export interface Grafted {
  readonly inputs: readonly TaskInput[];
  readonly initializers: readonly Added[];
  /** Outputs for a probe of the first adapted layer in the main graph. */
  readonly probe: ProbeOutputs | undefined;
  /** The same of the first layer of each kind that is not linear. */
  readonly formProbes: readonly FormProbe[];
}

/** Values of one adapted layer that are outputs of the graph: x, f32 rows of [in], and the term, f32 rows of [out]. */
export interface ProbeOutputs {
  readonly module: string;
  readonly x: string;
  readonly term: string;
}

/** The same of the first layer of a kind that is not linear: x as the model has it. */
export interface FormProbe extends ProbeOutputs {
  /** "weight": of a normalisation; `module` is the parameter. */
  readonly kind: Form["kind"] | "weight";
  /** Shape of a convolution's kernel, [out, channels, …], and its attributes. */
  readonly shape: readonly number[];
  readonly strides: readonly number[];
  readonly dilations: readonly number[];
  readonly pads: readonly number[];
  readonly autoPad: string;
}
