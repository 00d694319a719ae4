/**
 * A runtime of ONNX models in plain JavaScript: it shows that `Engine` is all that a session asks of a runtime. It has
 * the operators of the models in session.test.ts and of what sessions add to them. A value is a list of f64 numbers,
 * whatever its ONNX type; so is an attribute, except a tensor, which comes as the last input.
 */
import { BackendError } from "eigenlora";
import type { DetachedModel, Engine, EngineTensor, LoadedModel, Tensors } from "eigenlora/session";
import { f16ToF32, openSource } from "./internals/base.ts";
import { parseModel, readOnnxTensor as readTensor, type TensorProto } from "./internals/models.ts";

type Numbers = readonly number[];
type Value = { readonly dims: Numbers; readonly data: Numbers };
type Operator = (attributes: Readonly<Record<string, Numbers>>, ...inputs: Value[]) => Value | Value[];

function fail(message: string): never {
  throw new BackendError(message, { backend: "plain" });
}

const count = (dims: Numbers): number => dims.reduce((a, b) => a * b, 1);
const sum = (data: Numbers): number => data.reduce((a, b) => a + b, 0);
const list = (data: Numbers): Value => ({ dims: [data.length], data });
/** Counts an axis or index from the front. */
const wrap = (at: number, size: number): number => (at < 0 ? at + size : at);

/** @param f gives the element at some coordinates, which it must not keep */
function make(dims: Numbers, f: (at: number[]) => number): Value {
  const at = dims.map(() => 0);
  const data = Array.from({ length: count(dims) }, () => {
    const element = f(at);
    for (let axis = dims.length - 1; axis >= 0 && ++at[axis] === dims[axis]; axis--) at[axis] = 0;
    return element;
  });
  return { dims, data };
}

/** Index of the element at some coordinates. Of too many coordinates the last ones count; an axis of size 1 repeats. */
function place(dims: Numbers, at: Numbers): number {
  const skipped = at.length - dims.length;
  return dims.reduce((found, size, axis) => found * size + (size === 1 ? 0 : wrap(at[skipped + axis], size)), 0);
}
const get = ({ dims, data }: Value, at: Numbers): number => data[place(dims, at)];

/** Dimensions that both broadcast to. */
function common(a: Numbers, b: Numbers): Numbers {
  if (a.length < b.length) return common(b, a);
  return a.map((size, axis) => {
    const other = b[axis - a.length + b.length] ?? 1;
    return size === other || other === 1 ? size : size === 1 ? other : fail(`[${a}] and [${b}] do not broadcast`);
  });
}

const expand = (x: Value, dims: Numbers): Value => (`${x.dims}` === `${dims}` ? x : make(dims, (at) => get(x, at)));

/** Computes each element from the inputs' elements at its place. */
function each(f: (...elements: number[]) => number, ...inputs: Value[]): Value {
  const dims = inputs.map((input) => input.dims).reduce(common);
  const [a, b = a, c = a, d = a] = inputs.map((input) => expand(input, dims).data);
  return { dims, data: a.map((element, i) => f(element, b[i], c[i], d[i])) };
}

/** Computes one number from each row of the last axis. */
function reduce({ dims, data }: Value, [axis]: Numbers, f: (row: Numbers) => number): Value {
  if (wrap(axis, dims.length) !== dims.length - 1) fail(`axis ${axis} of [${dims}]: only the last one is known`);
  return make(dims.with(-1, 1), (at) => f(data.slice(place(dims, at), place(dims, at) + dims.at(-1)!)));
}

function multiply(a: Value, b: Value): Value {
  const [[rows, inner], [height, columns]] = [a.dims.slice(-2), b.dims.slice(-2)];
  if (inner !== height) fail(`[${a.dims}] does not multiply [${b.dims}]`);
  return make([...common(a.dims.slice(0, -2), b.dims.slice(0, -2)), rows, columns], (at) => {
    const [row, column] = [place(a.dims, at.with(-1, 0)), place(b.dims, at.with(-2, 0))];
    let total = 0;
    for (let k = 0; k < inner; k++) total += a.data[row + k] * b.data[column + k * columns];
    return total;
  });
}

function transpose(x: Value, axes: Numbers): Value {
  const order = axes.map((_, axis) => axes.indexOf(axis));
  const turned = (at: Numbers): Numbers => order.map((axis) => at[axis]);
  return make(
    axes.map((axis) => x.dims[axis]),
    (at) => get(x, turned(at)),
  );
}

/** A series of positive terms, so that nothing cancels out. */
function erf(x: number): number {
  if (!(Math.abs(x) < 6)) return Math.sign(x);
  let [total, term] = [0, (2 / Math.sqrt(Math.PI)) * Math.exp(-x * x) * x];
  for (let n = 3; total + term !== total; n += 2) [total, term] = [total + term, (term * 2 * x * x) / n];
  return total;
}

const OPERATORS: Readonly<Record<string, Operator>> = {
  Add: (_, ...of) => each((a, b) => a + b, ...of),
  And: (_, ...of) => each((a, b) => a && b, ...of),
  Cast: ({ to: [to] }, x) => each((v) => (to === 9 ? Number(v !== 0) : to === 7 ? Math.trunc(v) : v), x),
  CastLike: (_, x) => x,
  Concat: ({ axis: [axis] }, ...parts) =>
    parts.reduce((a, b) => {
      const size = a.dims.at(axis)!;
      const dims = a.dims.with(axis, size + b.dims.at(axis)!);
      return make(dims, (at) => (at.at(axis)! < size ? get(a, at) : get(b, at.with(axis, at.at(axis)! - size))));
    }),
  Constant: ({ value_ints, value_int, value_float }, value) =>
    value ?? (value_ints ? list(value_ints) : { dims: [], data: value_int ?? value_float }),
  ConstantOfShape: (_, shape, value) => make(shape.data, () => value?.data[0] ?? 0),
  DequantizeLinear: (_, x, scale) => each((v, s) => v * s, x, scale),
  Div: (_, ...of) => each((a, b) => a / b, ...of),
  Equal: (_, ...of) => each((a, b) => Number(a === b), ...of),
  Erf: (_, x) => each(erf, x),
  Expand: (_, x, { data }) => expand(x, common(x.dims, data)),
  Flatten: ({ axis: [axis] = [1] }, { dims, data }) => {
    return { dims: [count(dims.slice(0, axis)), count(dims.slice(axis))], data };
  },
  Gather: ({ axis: [from] = [0] }, x, index) => {
    const axis = wrap(from, x.dims.length);
    const end = axis + index.dims.length;
    const dims = x.dims.toSpliced(axis, 1, ...index.dims);
    return make(dims, (at) => get(x, [...at.slice(0, axis), get(index, at.slice(axis, end)), ...at.slice(end)]));
  },
  GatherND: (_, x, index) => {
    const [outer, depth] = [index.dims.slice(0, -1), index.dims.at(-1)!];
    return make([...outer, ...x.dims.slice(depth)], (at) => {
      const row = place(index.dims, [...at.slice(0, outer.length), 0]);
      return get(x, [...index.data.slice(row, row + depth), ...at.slice(outer.length)]);
    });
  },
  Gelu: (_, x) => each((v) => (v * (1 + erf(v * Math.SQRT1_2))) / 2, x),
  Gemm: ({ transA: [transA] = [0], transB: [transB] = [0], alpha: [alpha] = [1], beta: [beta] = [1] }, a, b, c) => {
    const product = multiply(transA ? transpose(a, [1, 0]) : a, transB ? transpose(b, [1, 0]) : b);
    return each((v, bias) => alpha * v + beta * bias, product, c);
  },
  GreaterOrEqual: (_, ...of) => each((a, b) => Number(a >= b), ...of),
  Identity: (_, x) => x,
  IsNaN: (_, x) => each((v) => Number(Number.isNaN(v)), x),
  LayerNormalization: ({ axis = [-1], epsilon: [epsilon] = [1e-5] }, x, scale, bias) => {
    const mean = reduce(x, axis, (row) => sum(row) / row.length);
    const centred = each((v, m) => v - m, x, mean);
    const variance = reduce(centred, axis, (row) => sum(row.map((v) => v * v)) / row.length);
    return each((v, s, k, b) => (v / Math.sqrt(s + epsilon)) * k + b, centred, variance, scale, bias);
  },
  MatMul: (_, a, b) => multiply(a, b),
  MatMulNBits: ({ K: [K], N: [N], bits: [bits], block_size: [size] }, x, packed, scales, zeros) => {
    if (bits !== 4 || zeros) fail("MatMulNBits: only 4 bits without zero points are known");
    // The lower half of a byte comes first; blocks along K share a scale.
    const weight = make([K, N], ([k, n]) => {
      const block = n * Math.ceil(K / size) + Math.floor(k / size);
      const at = block * size + (k % size);
      return (((packed.data[at >> 1] >> (4 * (at % 2))) & 15) - 8) * scales.data[block];
    });
    return multiply(x, weight);
  },
  Max: (_, ...of) => of.reduce((x, y) => each((a, b) => Math.max(a, b), x, y)),
  Mul: (_, ...of) => each((a, b) => a * b, ...of),
  Range: (_, { data: [from] }, { data: [to] }, { data: [step] }) =>
    make([Math.max(Math.ceil((to - from) / step), 0)], ([i]) => from + i * step),
  Reshape: ({ allowzero: [allowzero] = [0] }, { dims, data }, { data: to }) => {
    const known = to.map((size, axis) => (size === 0 && !allowzero ? dims[axis] : size));
    const shape = known.map((size) => (size === -1 ? data.length / -count(known) : size));
    return count(shape) === data.length ? { dims: shape, data } : fail(`[${dims}] cannot become [${to}]`);
  },
  Shape: ({ start, end }, { dims }) => list(dims.slice(start?.[0], end?.[0])),
  Split: ({ axis: [axis] }, x, sizes) => {
    let end = 0;
    return sizes.data.map((size) => {
      const start = (end += size) - size;
      return make(x.dims.with(axis, size), (at) => get(x, at.with(axis, start + at.at(axis)!)));
    });
  },
  Slice: (_, x, starts, ends, axes = list([...starts.data.keys()]), steps = list([])) => {
    if (steps.data.some((step) => step !== 1)) fail(`Slice: steps of [${steps.data}]: only steps of 1 are known`);
    const kept = x.dims.map((size) => [...Array(size).keys()]);
    for (const [i, axis] of axes.data.entries()) {
      kept.splice(axis, 1, kept.at(axis)!.slice(starts.data[i], ends.data[i]));
    }
    const dims = kept.map(({ length }) => length);
    return make(dims, (at) =>
      get(
        x,
        at.map((i, axis) => kept[axis][i]),
      ),
    );
  },
  Softmax: ({ axis = [-1] }, x) => {
    const highest = reduce(x, axis, (row) => Math.max(...row));
    const powers = each((v, high) => Math.exp(v - high), x, highest);
    return each((v, total) => v / total, powers, reduce(powers, axis, sum));
  },
  Sqrt: (_, x) => each(Math.sqrt, x),
  Squeeze: (_, { dims, data }, axes) => {
    const gone = axes?.data.map((axis) => wrap(axis, dims.length));
    return { dims: dims.filter((size, axis) => (gone ? !gone.includes(axis) : size !== 1)), data };
  },
  Sub: (_, ...of) => each((a, b) => a - b, ...of),
  Tanh: (_, x) => each(Math.tanh, x),
  Transpose: ({ perm }, x) => transpose(x, perm),
  Unsqueeze: (_, { dims, data }, axes) => {
    const sorted = axes.data.map((axis) => wrap(axis, dims.length + axes.data.length)).sort((a, b) => a - b);
    return { dims: sorted.reduce((made: Numbers, axis) => made.toSpliced(axis, 0, 1), dims), data };
  },
  Where: (_, ...of) => each((condition, a, b) => (condition ? a : b), ...of),
};

type Values = Map<string, Value>;

interface PlainModel extends LoadedModel {
  readonly constants: Values;
  /** One step per node: computes its output from existing values. */
  readonly steps: readonly ((values: Values) => void)[];
}

/** `TensorProto.DataType`, its name and the array of its values; f16 as bits. */
const TYPES = [
  [1, "float32", Float32Array],
  [7, "int64", BigInt64Array],
  [9, "bool", Uint8Array],
  [2, "uint8", Uint8Array],
  [3, "int8", Int8Array],
  [10, "float16", Uint16Array],
] as const;

function toValue(dims: readonly number[], data: unknown): Value {
  const convert = data instanceof Uint16Array ? f16ToF32 : Number;
  return { dims, data: Array.from(data as ArrayLike<number>, (element) => convert(element)) };
}

const read = (values: Values, name: string): Value => values.get(name) ?? fail(`nothing gives a value to "${name}"`);

export class PlainTensor implements EngineTensor {
  readonly type: string;
  readonly data: unknown;
  readonly dims: readonly number[];

  constructor(type: string, data: unknown, dims: readonly number[]) {
    this.type = type;
    this.data = data;
    this.dims = dims;
  }
}

export class PlainEngine implements Engine<PlainModel> {
  readonly name = "plain";
  readonly provider = "plain JavaScript";

  async load({ bytes, files }: DetachedModel): Promise<PlainModel> {
    const { node, initializer, input, output } = parseModel(bytes, "model").graph.proto;
    const constants: Values = new Map();
    const open = (location: string) =>
      openSource(files.find(({ path }) => path === location)?.data ?? fail(`there is no file "${location}"`));
    const keep = async (name: string, tensor: TensorProto): Promise<void> => {
      const type = TYPES.find(([id]) => id === tensor.dataType);
      const [, , array] = type ?? fail(`the data type ${tensor.dataType} of "${name}" is not known`);
      const { shape, data } = await readTensor(tensor, "model", open);
      constants.set(name, toValue(shape, new array(data.slice().buffer)));
    };
    for (const tensor of initializer) await keep(tensor.name, tensor);
    const steps: ((values: Values) => void)[] = [];
    for (const { opType, attribute, input, output } of node) {
      const operator = OPERATORS[opType] ?? fail(`the operator ${opType}, which makes "${output[0]}", is not known`);
      const attributes: Record<string, readonly number[]> = {};
      const inputs = [...input];
      for (const { name, t, f, i, ints } of attribute) {
        if (!t) attributes[name] = ints.length > 0 ? ints.map(Number) : [f || Number(i)];
        else await keep(inputs[inputs.push(`${output[0]}/${name}`) - 1], t);
      }
      steps.push((values) => {
        const made = [operator(attributes, ...inputs.map((name) => read(values, name)))].flat();
        for (const [i, value] of made.entries()) values.set(output[i], value);
      });
    }
    const [inputNames, outputNames] = [input, output].map((values) => values.map(({ name }) => name));
    return { inputNames, outputNames, constants, steps };
  }

  /** @returns f32 values: the models' outputs are logits, as are ours */
  async run({ steps, constants }: PlainModel, feeds: Tensors, fetches: unknown): Promise<Tensors> {
    // Other work goes on meanwhile, as with a runtime that has threads.
    await new Promise(setImmediate);
    const values: Values = new Map(constants);
    for (const [name, { dims, data }] of Object.entries(feeds)) values.set(name, toValue(dims, data));
    for (const step of steps) step(values);
    const results = (fetches as string[]).map((name) => ({ name, ...read(values, name) }));
    return Object.fromEntries(
      results.map(({ name, dims, data }) => [name, this.tensor(Float32Array.from(data), dims)]),
    );
  }

  /** The type is for callers only: here numbers are numbers. */
  tensor(data: unknown, dims: readonly number[], type?: string): PlainTensor {
    return new PlainTensor(type ?? TYPES.find(([, , array]) => data instanceof array)?.[1] ?? "int32", data, dims);
  }

  /** Runs that come too late find no weights. */
  async release({ constants }: PlainModel): Promise<void> {
    constants.clear();
  }
}
