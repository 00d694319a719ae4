/** What stays of a model's own values once it is loaded: what tasks change beside their terms is told from these. */
/** How a task reaches the model. */
export type Mode = "core" | "factors" | "folded";

/** A head as the base has it. */
export interface BaseHead {
  /** [in, labels]. */
  readonly weight: Float32Array;
  /** [labels]. */
  readonly bias: Float32Array | undefined;
  readonly labels: number;
  /** Whether other tasks adapt the layer: no task may give it another number of labels then. */
  readonly adapted: boolean;
}

/** What is to be known of the model to evaluate tasks, once it is loaded. Holds nothing of the graph or the file. */
export interface BaseValues {
  readonly mode: Mode;
  /** By module name of the pack. */
  readonly heads: ReadonlyMap<string, BaseHead>;
  /** Values of the biases that tasks change, by the pack's name of the parameter. */
  readonly biases: ReadonlyMap<string, Float32Array>;
  /** Float weights of modules with DoRA, f32 [out, in], by module name. */
  readonly weights: ReadonlyMap<string, Float32Array>;
  /** Parameters that tasks may bring, by the pack's names: for these the model is prepared. */
  readonly wanted: ReadonlySet<string>;
  /** Parameters of tasks that are left out. */
  readonly ignored: ReadonlySet<string>;
}
