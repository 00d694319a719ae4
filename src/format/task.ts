/**
 * One task's blob: the header read and checked, its tensors located (SPEC.md, section 6).
 */

import { FormatError } from "../errors.ts";
import { align4, DTYPES, isQuantized, tensorBytes } from "../tensor/dtypes.ts";
import { Fields } from "./fields.ts";
import {
  type Coefficients,
  type PackModule,
  ROLES,
  type Side,
  TASK_BLOB_MAGIC,
  type TaskBlob,
  type TaskParameter,
  type TaskTerm,
  type TensorRef,
} from "./format.ts";
import { decode, type Value } from "./messagepack.ts";

/**
 * Checks a task blob against the basis it belongs to, its numbers included.
 * @param bytes the whole blob; kept by the result
 * @throws FormatError saying which rule of SPEC.md, section 6, does not hold
 */
export function parseTask(bytes: Uint8Array, modules: readonly PackModule[], file: string, id: string): TaskBlob {
  const f: Fields = new Fields(bytes, file, `task "${id}"`);
  f.check(bytes.length >= 8 && f.u32(0) === TASK_BLOB_MAGIC, () => "this is not a task blob");
  const headerLength = f.u32(4);
  f.check(headerLength <= bytes.length - 8, () => `a header of ${headerLength} bytes in a blob of ${bytes.length}`);
  const root = decode(bytes.subarray(8, 8 + headerLength), file, f.part, "header").array(8);
  let end = 8 + headerLength;
  const tensor = (code: Value, rows: number, width: number): TensorRef => {
    const dtype = DTYPES[code.integer(0, DTYPES.length - 1)]!;
    const byteOffset = align4(end);
    const byteLength = tensorBytes(dtype, rows, width);
    end = byteOffset + byteLength;
    f.check(end <= bytes.length, () => `its tensors need ${end} bytes or more, the blob has ${bytes.length}`);
    return { dtype, rows, width, byteOffset, byteLength };
  };
  f.check(root.length >= 2, () => "the header has no terms and parameters");
  let last = -1;
  const terms = root[0]!.array(65_536).map((term: Value) => {
    const parsed = parseTerm(term, modules, tensor);
    term.check(parsed.module > last, () => "terms are not sorted by module");
    last = parsed.module;
    return parsed;
  });
  const names = new Set<string>();
  const parameters = root[1]!.array(65_536).map((parameter: Value) => {
    const parsed = parseParameter(parameter, tensor);
    const key = `${parsed.role} ${parsed.name}`;
    parameter.check(!names.has(key), () => `"${parsed.name}" is there twice`);
    names.add(key);
    return parsed;
  });
  f.check(end === bytes.length, () => `its tensors end at ${end}, the blob has ${bytes.length} bytes`);
  const finite = (tensor: TensorRef | undefined, name: string): void => {
    if (tensor) checkFinite(bytes, tensor, file, f.part, name);
  };
  for (const { module, A, B, privateA, privateBt, magnitude } of terms) {
    const tensors = { A: A?.tensor, B: B?.tensor, "private A": privateA, "private B": privateBt, magnitude };
    for (const [what, tensor] of Object.entries(tensors)) finite(tensor, `${what} of "${modules[module]!.name}"`);
  }
  for (const { name, tensor } of parameters) finite(tensor, `"${name}"`);
  return { terms, parameters, bytes };
}

function parseTerm(
  term: Value,
  modules: readonly PackModule[],
  tensor: (code: Value, rows: number, width: number) => TensorRef,
): TaskTerm {
  const item = term.items();
  const index = item(0).integer(0, modules.length - 1);
  const module = modules[index]!;
  const rank = item(1).integer(0, 65_535);
  const side = (value: Value, basis: Side | undefined): Coefficients | undefined => {
    if (value.absent) return undefined;
    const code = value.integer(0, 8 * DTYPES.length - 1);
    const kind = code & 3;
    value.check(
      basis !== undefined && kind === (basis.kind === "column" ? 1 : 2),
      () => `coefficients of kind ${kind} for a basis of kind ${basis?.kind ?? "none"}`,
    );
    const mean = (code & 4) !== 0;
    value.check(!mean || basis.mean, () => "a mean is asked for, but the basis has none");
    value.check(
      basis.rank === undefined ? rank > 0 : rank === basis.rank,
      () => `rank ${rank}, but the basis is ${basis.kind}${basis.rank === undefined ? "" : ` of rank ${basis.rank}`}`,
    );
    const rows = basis.kind === "column" ? rank : 1;
    return { mean, tensor: tensor(value.of(code >> 3), rows, basis.K) };
  };
  const A = side(item(2), module.A);
  const B = side(item(3), module.B);
  term.check((A === undefined) === (B === undefined), () => `"${module.name}" has coefficients on one side only`);
  term.check(A !== undefined || rank === 0, () => `"${module.name}" has rank ${rank} but no coefficients`);
  const q = item(4).integer(0, 65_535);
  return {
    module: index,
    rank,
    A,
    B,
    privateRank: q,
    privateA: q > 0 ? tensor(item(5), q, module.in) : undefined,
    privateBt: q > 0 ? tensor(item(5), q, module.out) : undefined,
    magnitude: item(6).absent ? undefined : tensor(item(6), 1, module.out),
  };
}

function parseParameter(
  parameter: Value,
  tensor: (code: Value, rows: number, width: number) => TensorRef,
): TaskParameter {
  const item = parameter.items();
  const name = item(0).string(1024);
  const role = ROLES[item(1).integer(0, ROLES.length - 1)]!;
  const shape = item(3)
    .array(8)
    .map((d) => d.integer(1, 2 ** 31 - 1));
  parameter.check(shape.length > 0, () => `"${name}" has no shape`);
  parameter.check(role !== "rows" || shape.length === 2, () => `"${name}" needs two dimensions, got [${shape}]`);
  parameter.check(
    (role !== "bias" && role !== "bias-delta") || shape.length === 1,
    () => `"${name}" is a bias, expected one dimension, got [${shape}]`,
  );
  const rows = shape.length === 1 ? 1 : shape[0]!;
  const width = shape.slice(shape.length === 1 ? 0 : 1).reduce((a, b) => a * b, 1);
  parameter.check(Number.isSafeInteger(rows * width), () => `"${name}" is too large: [${shape}]`);
  const indices =
    role === "rows"
      ? item(4)
          .array(shape[0]!)
          .map((i) => i.integer(0, 2 ** 31 - 1))
      : undefined;
  if (indices) {
    parameter.check(
      indices.length === shape[0],
      () => `"${name}": ${indices.length} rows are named, ${shape[0]} stored`,
    );
    parameter.check(
      indices.every((v, i) => i === 0 || v > indices[i - 1]!),
      () => `"${name}": rows are not ascending`,
    );
  }
  return { name, role, shape, indices, tensor: tensor(item(2), rows, width) };
}

/**
 * Refuses NaN and infinity in a tensor: they would spread to the whole weight and no sum would show where from.
 * @throws FormatError naming the tensor
 */
export function checkFinite(section: Uint8Array, tensor: TensorRef, file: string, part: string, name: string): void {
  const { dtype, rows, width } = tensor;
  const start = section.byteOffset + tensor.byteOffset;
  const view = new DataView(section.buffer, start, tensor.byteLength);
  const bad = (row: number, what: string): never => {
    throw new FormatError(`${name}: ${what} of row ${row} is NaN or infinite`, { file, part });
  };
  if (isQuantized(dtype)) {
    for (let i = 0; i < rows; i++) if ((view.getUint16(2 * i, true) & 0x7c00) === 0x7c00) bad(i, "the scale");
    return;
  }
  const [step, exponent] = dtype === "f32" ? [4, 0x7f80] : [2, dtype === "f16" ? 0x7c00 : 0x7f80];
  for (let i = 0, at = step - 2; i < rows * width; i++, at += step) {
    if ((view.getUint16(at, true) & exponent) === exponent) bad(Math.floor(i / width), `value ${i % width}`);
  }
}
