/** A runtime of ONNX models in plain JavaScript: it shows that `Engine` is all that a session asks of a runtime. */
import type { DetachedModel, Engine, EngineTensor, LoadedModel, Tensors } from "eigenlora/session";
import { f16ToF32, openSource } from "./internals/base.ts";
import { parseModel, readOnnxTensor as readTensor, type TensorProto } from "./internals/models.ts";
import { fail, OPERATORS, type Value } from "./plain-operators.ts";

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
