/**
 * Expected terms beside linear layers, for the probe: of convolutions at some positions, of tables, and of weights of normalisations.
 * Loaded for a model that has some.
 */
import type { FormProbe, TaskInput } from "../onnx/adapted.ts";
import type { ComponentRows } from "../onnx/components.ts";
import type { PreparedModel } from "./prepare.ts";
import { type ProbedLayer, type ProbeValue, termOf } from "./probe-term.ts";
import type { InputValues } from "./values.ts";

/** A term as it should be, and as it is. */
interface ExpectedTerm {
  readonly module: string;
  readonly expected: Float64Array;
  readonly term: ArrayLike<number>;
}

/** @param values x and term of each probe */
export function expectedTerms(
  probes: readonly FormProbe[],
  { modules, inputs }: Pick<PreparedModel, "modules" | "inputs">,
  task: InputValues,
  values: readonly ProbeValue[],
): ExpectedTerm[] {
  return probes.map((probe, i) => {
    const [x, term] = [values[2 * i]!, values[2 * i + 1]!];
    const layer = modules.find(({ name }) => name === probe.module);
    const { module } = probe;
    if (probe.kind === "convolution") return { module, ...ofConvolution(probe, layer!, inputs, task, x, term) };
    if (probe.kind === "embedding") return { module, ...ofTable(layer!, inputs, task, x, term) };
    const change = valueOf(inputs, task, module, "bias");
    return { module, expected: Float64Array.from(x.data, (v, j) => v * change[j % change.length]!), term: term.data };
  });
}

function valueOf(inputs: readonly TaskInput[], task: InputValues, of: string, kind: string): Float32Array {
  return task.get(inputs.find((input) => input.of === of && input.kind === kind)!.name)!.data as Float32Array;
}

/** Most positions and indices that are compared: plain arithmetic on all of an image takes long. */
const MOST_LOOKED_AT = 48;

/** Indices spread over `count`, the first and the last among them. */
function sample(count: number): number[] {
  const many = Math.min(count, MOST_LOOKED_AT);
  return Array.from({ length: many }, (_, i) => Math.round((i * (count - 1)) / Math.max(many - 1, 1)));
}

function ofConvolution(
  probe: FormProbe,
  layer: ProbedLayer,
  inputs: readonly TaskInput[],
  task: InputValues,
  { dims, data }: ProbeValue,
  term: ProbeValue,
): Omit<ExpectedTerm, "module"> {
  const { out } = layer;
  const sizes = outputSizes(probe, dims);
  const positions = sizes.reduce((a, b) => a * b, 1);
  const looked = sample(dims[0]! * positions);
  const patches = new Float32Array(looked.length * layer.in);
  for (const [i, at] of looked.entries()) {
    const row = patches.subarray(i * layer.in, (i + 1) * layer.in);
    fillPatch(row, probe, { dims, data }, Math.floor(at / positions), placeOf(at % positions, sizes), sizes);
  }
  const expected = termOf(layer, patches, inputs, task);
  const found = new Float64Array(expected.length);
  for (const [i, at] of looked.entries()) {
    const first = Math.floor(at / positions) * out * positions + (at % positions);
    for (let o = 0; o < out; o++) found[i * out + o] = term.data[first + o * positions]!;
  }
  return { expected, term: found };
}

/** The index in each dimension of the i-th element. */
function placeOf(i: number, sizes: readonly number[]): number[] {
  let rest = i;
  return [...sizes]
    .reverse()
    .map((size) => {
      const at = rest % size;
      rest = Math.floor(rest / size);
      return at;
    })
    .reverse();
}

/** Distance from the first to the last element that a kernel touches. */
function reach({ shape, dilations }: FormProbe, axis: number): number {
  return (shape[2 + axis]! - 1) * (dilations[axis] ?? 1) + 1;
}

function outputSizes(probe: FormProbe, dims: readonly number[]): number[] {
  const { strides, pads, autoPad } = probe;
  return dims.slice(2).map((size, axis) => {
    const stride = strides[axis] ?? 1;
    if (autoPad.startsWith("SAME")) return Math.ceil(size / stride);
    const padding = (pads[axis] ?? 0) + (pads[axis + dims.length - 2] ?? 0);
    return Math.floor((size + padding - reach(probe, axis)) / stride) + 1;
  });
}

/** Elements of padding in front of the first. */
function padBefore(probe: FormProbe, axis: number, size: number, out: number): number {
  const { strides, pads, autoPad } = probe;
  if (!autoPad.startsWith("SAME")) return pads[axis] ?? 0;
  const all = Math.max((out - 1) * (strides[axis] ?? 1) + reach(probe, axis) - size, 0);
  return autoPad === "SAME_LOWER" ? Math.ceil(all / 2) : Math.floor(all / 2);
}

/** Fills a patch [channels, …]: the elements of one image under the kernel at one position; zeros beyond the border. */
function fillPatch(
  patch: Float32Array,
  probe: FormProbe,
  { dims, data }: ProbeValue,
  image: number,
  position: readonly number[],
  sizes: readonly number[],
): void {
  const { shape, strides, dilations } = probe;
  const spatial = dims.slice(2);
  const kernel = shape.slice(2);
  const [channels, elements] = [shape[1]!, kernel.reduce((a, b) => a * b, 1)];
  const area = spatial.reduce((a, b) => a * b, 1);
  for (let e = 0; e < elements; e++) {
    let [at, inside] = [0, true];
    for (const [axis, k] of placeOf(e, kernel).entries()) {
      const before = padBefore(probe, axis, spatial[axis]!, sizes[axis]!);
      const i = position[axis]! * (strides[axis] ?? 1) + k * (dilations[axis] ?? 1) - before;
      inside &&= i >= 0 && i < spatial[axis]!;
      at = at * spatial[axis]! + i;
    }
    for (let c = 0; inside && c < channels; c++) patch[c * elements + e] = data[(image * channels + c) * area + at]!;
  }
}

/** Treats a table as a linear layer on rows with a single 1, over the few indices that are compared. */
function ofTable(
  layer: ProbedLayer,
  inputs: readonly TaskInput[],
  task: InputValues,
  ids: ProbeValue,
  term: ProbeValue,
): Omit<ExpectedTerm, "module"> {
  const { name, in: rows, out, components } = layer;
  const looked = sample(ids.data.length);
  const width = looked.length;
  const rowsOf = (table: Float32Array): Float32Array => {
    const columns = table.length / rows;
    const found = new Float32Array(width * columns);
    for (const [i, at] of looked.entries()) {
      const row = (ids.data[at]! + rows) % rows;
      found.set(table.subarray(row * columns, (row + 1) * columns), i * columns);
    }
    return found;
  };
  const few = new Map(task);
  const A = inputs.find(({ of, kind }) => of === name && kind === "A");
  if (A) {
    const { dims, data } = task.get(A.name)!;
    few.set(A.name, { dims: [width, dims[1]!], data: rowsOf(data as Float32Array) });
  }
  // Columns of E_A for the compared rows.
  const own = components && {
    ...components,
    A: columnsOf(
      components.A,
      looked.map((at) => (ids.data[at]! + rows) % rows),
    ),
  };
  const ones = Float32Array.from({ length: width * width }, (_, i) => Number(i % (width + 1) === 0));
  const expected = termOf({ ...layer, in: width, components: own }, ones, inputs, few);
  const found = new Float64Array(width * out);
  for (const [i, at] of looked.entries()) found.set(term.data.subarray(at * out, (at + 1) * out), i * out);
  return { expected, term: found };
}

/** Some columns of components. */
function columnsOf(side: ComponentRows, columns: readonly number[]): ComponentRows {
  const floats = (): Float32Array => {
    const values = side.floats();
    return Float32Array.from(
      { length: side.rows * columns.length },
      (_, i) => values[Math.floor(i / columns.length) * side.width + columns[i % columns.length]!]!,
    );
  };
  return { rows: side.rows, width: columns.length, floats };
}
