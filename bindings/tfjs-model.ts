/**
 * Where TF.js has the weights of its kinds of models, and what adapters call them. The module is the caller's own import; types are
 * structural, so that TF.js is not needed to compile against this package.
 */
import { described } from "../src/arguments.ts";
import { sameShape } from "../src/core/base.ts";
import type { Layout } from "../src/format/format.ts";
import { type Called, calledByAdapters } from "./framework-host.ts";
import { calledInGraph, type Executor, graphEntry } from "./tfjs-graph.ts";

/** A tensor of TF.js, as far as hosts need it. */
export interface TfTensor {
  readonly shape: number[];
  readonly dtype: string;
  readonly dataId: object;
  data(): Promise<ArrayLike<number>>;
  dispose(): void;
}

/** A variable of TF.js, likewise. */
export interface TfVariable extends TfTensor {
  readonly trainable: boolean;
  assign(value: never): void;
}

/** The module `@tensorflow/tfjs`, `@tensorflow/tfjs-core` or another with the same interface. */
export interface Tfjs {
  getBackend(): string;
  backend(): object;
  tensor(values: Float32Array, shape: never): TfTensor;
  transpose(tensor: never, axes: number[]): TfTensor;
  variable(value: never, trainable?: boolean): TfVariable;
}

/** A model of layers, as `loadLayersModel` and `sequential` return it. */
export interface TfLayersModel {
  readonly weights: readonly { readonly originalName: string; readonly name: string; read(): TfTensor }[];
}

/** A converted graph, as `loadGraphModel` returns it. */
export interface TfGraphModel {
  readonly weights: { readonly [name: string]: TfTensor[] };
}

/** Holder of the weights: a model, or variables by name. */
export type TfjsModel = TfLayersModel | TfGraphModel | Map<string, TfVariable>;

/** A weight, where TF.js has it. */
export interface Entry {
  readonly layout: Layout | undefined;
  /** Shape that the model was made with. */
  readonly shape: readonly number[];
  tensor(): TfTensor;
  put(value: TfTensor | null): void;
}

/** A model's weights of type float32, by the names that adapters use. @throws TypeError when it is no model */
export function entriesOf(tf: Tfjs, model: TfjsModel): Map<string, Entry> {
  const entries = new Map<string, Entry>();
  const add = (called: Called, own: string, entry: Pick<Entry, "tensor" | "put">): void => {
    const { dtype, shape } = entry.tensor();
    // The second of two equal names is replaced by the model's own.
    if (dtype === "float32") entries.set(entries.has(called.name) ? own : called.name, { ...entry, ...called, shape });
  };
  if (model instanceof Map) {
    for (const [name, variable] of model) {
      const entry = variableEntry(tf, variable, (now) => model.set(name, now));
      add(calledByAdapters(name), name, entry);
    }
  } else if (Array.isArray(model?.weights)) {
    for (const weight of model.weights as { originalName: string; name: string; val: TfVariable }[]) {
      const entry = variableEntry(tf, weight.val, (now) => (weight.val = now));
      add(calledByAdapters(weight.originalName), weight.name, entry);
    }
  } else if (isGraphModel(model)) {
    const { executor } = model;
    for (const name of Object.keys(executor.weightMap))
      add(calledInGraph(name, executor.graph.nodes[name]), name, graphEntry(executor, name));
  } else throw new TypeError(`tfjsHost: expected a LayersModel, a GraphModel or a Map, got ${described(model)}`);
  return entries;
}

function isGraphModel(model: unknown): model is { readonly executor: Executor<TfTensor> } {
  return typeof (model as { executor?: Executor<TfTensor> } | null)?.executor?.weightMap === "object";
}

/** A variable has the values of its own shape; for others there is another in its place. */
function variableEntry(tf: Tfjs, own: TfVariable, show: (now: TfVariable) => void): Pick<Entry, "tensor" | "put"> {
  let now = own;
  return {
    tensor: () => now,
    put(value) {
      if (now !== own) now.dispose();
      const fits = sameShape(value!.shape, own.shape);
      if (fits) own.assign(value as never);
      now = fits ? own : tf.variable(value as never, own.trainable);
      value!.dispose();
      show(now);
    },
  };
}

/** A variable that a map does not have yet. */
export function newEntry(tf: Tfjs, model: Map<string, TfVariable>, name: string): Entry {
  return {
    layout: undefined,
    shape: [],
    tensor: () => model.get(name)!,
    put(value) {
      model.get(name)?.dispose();
      model.delete(name);
      if (!value) return;
      model.set(name, tf.variable(value as never));
      value.dispose();
    },
  };
}
