/**
 * One task's blob: the header read and checked, its tensors located (SPEC.md, section 6).
 */

import { FormatError } from "../errors.ts";
import { BITS, DTYPES, type Dtype, f16ToF32, isQuantized, leastAt, rowBytes, scaleBytes } from "../tensor/dtypes.ts";
import { decode, Fields, placing, type Value } from "./fields.ts";
import {
  bringsOf,
  type Coefficients,
  FINGERPRINT_SIZE,
  mostRank,
  type PackModule,
  ROLES,
  type Side,
  TASK_BLOB_MAGIC,
  type TaskBlob,
  type TaskEntry,
  type TaskParameter,
  type TaskTerm,
  type TensorRef,
} from "./format.ts";

/**
 * Checks a task blob against the basis it belongs to, its numbers included, in pieces.
 * @param bytes the whole blob; kept by the result
 * @param brings what the directory says that it brings, where it says so
 * @throws FormatError saying which rule of SPEC.md, section 6, does not hold
 */
export function* parseTask(
  bytes: Uint8Array,
  modules: readonly PackModule[],
  file: string,
  { id, brings }: Pick<TaskEntry, "id" | "brings">,
): Generator<void, TaskBlob> {
  const f: Fields = new Fields(bytes, file, `task "${id}"`);
  f.check(bytes.length >= 8 && f.u32(0) === TASK_BLOB_MAGIC, () => "this is not a task blob");
  const headerLength = f.u32(4);
  f.check(headerLength <= bytes.length - 8, () => `a header of ${headerLength} bytes in a blob of ${bytes.length}`);
  const root = (yield* decode(bytes.subarray(8, 8 + headerLength), file, f.part, "header")).items(2);
  const { place: tensor, full } = placing(4, 8 + headerLength, bytes.length, file, f.part);
  let last = -1;
  const terms = yield* root[0]!.list(65_536, (term: Value) => {
    const parsed = parseTerm(term, modules, tensor);
    term.check(parsed.module > last, () => "terms are not sorted by module");
    last = parsed.module;
    return parsed;
  });
  const names = new Set<string>();
  const parameters: TaskParameter[] = [];
  for (const parameter of root[1]!.each(65_536)) {
    const parsed = yield* parseParameter(parameter, tensor);
    const key = `${parsed.role} ${parsed.name}`;
    f.check(!names.has(key), () => `"${parsed.name}" is there twice`);
    names.add(key);
    parameters.push(parsed);
    yield;
  }
  const adapted = new Set(terms.map(({ module }) => `${modules[module]!.name}.weight`));
  for (const { name, role } of parameters) {
    const twice =
      ((role === "saved" || role === "rows") && adapted.has(name)) || (role !== "saved" && names.has(`saved ${name}`));
    f.check(!twice, () => `it changes "${name}" in two ways`);
  }
  full();
  yield* checkTensors(bytes, 8 + headerLength, taskTensors(terms, parameters, modules), file, f.part);
  const blob = { terms, parameters, bytes };
  if (brings) {
    // Models are prepared for what the directory says. Many tasks may share one list, so it is not gone through where the count differs.
    const found = bringsOf(blob, modules);
    f.check(
      found.length === brings.length,
      () => `it brings ${found.length} parameters and modules, the directory says ${brings.length}`,
    );
    const said = new Set(brings);
    const unsaid = found.find((entry) => !said.delete(entry));
    f.check(unsaid === undefined, () => `it brings "${unsaid}", which the directory does not say`);
    for (const entry of said) f.check(false, () => `it does not bring "${entry}", which the directory says`);
  }
  return blob;
}

/** Lists tensors in the order of the blob, with what they are called in errors. */
export function* taskTensors(
  terms: readonly TaskTerm[],
  parameters: readonly TaskParameter[],
  modules: readonly PackModule[],
): Generator<Checked> {
  for (const { module, A, B, ownA, ownBt, privateA, privateBt, magnitude } of terms) {
    const { name } = modules[module]!;
    if (A) yield [`A of "${name}"`, A.tensor, true];
    if (B) yield [`B of "${name}"`, B.tensor, true];
    if (ownA) yield [`own A of "${name}"`, ownA, true];
    if (ownBt) yield [`own B of "${name}"`, ownBt, true];
    if (privateA) yield [`private A of "${name}"`, privateA, true];
    if (privateBt) yield [`private B of "${name}"`, privateBt, true];
    if (magnitude) yield [`magnitude of "${name}"`, magnitude, true];
  }
  for (const { name, tensor } of parameters) yield [`"${name}"`, tensor];
}

/** Says where the next tensor lies. */
type PlaceNext = (dtype: Dtype, rows: number, width: number) => TensorRef;

const typeOf = (code: Value): Dtype => DTYPES[code.integer(0, DTYPES.length - 1)]!;

/** A factor as a term gives it: its coefficients, the number of their basis, and the type of rows of its own. */
interface Given {
  readonly coefficients: Value;
  readonly basis?: Value | undefined;
  readonly own?: Value | undefined;
}

/** Undefined where there is none. A code alone stands for coefficients over the first basis. */
function givenOf(item: Value): Given | undefined {
  if (item.absent) return undefined;
  if (item.kind !== "array") return { coefficients: item };
  const [coefficients, basis, own] = item.items(3);
  return { coefficients: coefficients!, basis, own };
}

function coefficientsOf(
  given: Given,
  bases: readonly Side[],
  rank: number,
  tensor: PlaceNext,
): Coefficients | undefined {
  const item: Value = given.coefficients;
  const { basis: which, own } = given;
  const index = which === undefined ? 0 : which.integer(0, item.absent ? 0 : 65_535);
  if (item.absent) {
    item.check(own !== undefined && !own.absent, () => "it has neither coefficients nor rows of its own");
    return undefined;
  }
  const code = item.integer(0, 8 * DTYPES.length - 1);
  const kind = code & 3;
  const basis = bases[index];
  item.check(
    basis !== undefined && kind === (basis.kind === "column" ? 1 : 2),
    () => `coefficients of kind ${kind} for a basis of kind ${basis?.kind ?? "none"}`,
  );
  const mean = (code & 4) !== 0;
  item.check(!mean || basis.mean, () => "a mean is asked for, but the basis has none");
  item.check(
    basis.rank === undefined || rank === basis.rank,
    () => `rank ${rank}, but the basis is ${basis.kind} of rank ${basis.rank}`,
  );
  const rows = basis.kind === "column" ? rank : 1;
  return { basis: index, mean, tensor: tensor(DTYPES[code >> 3]!, rows, basis.K) };
}

function parseTerm(term: Value, modules: readonly PackModule[], tensor: PlaceNext): TaskTerm {
  const [moduleItem, rankItem, itemA, itemB, privateRankItem, privateTypeItem, magnitudeItem] = term.items(7);
  const index = moduleItem!.integer(0, modules.length - 1);
  const { name, in: inputs, out, A: basesA, B: basesB } = modules[index]!;
  const rank = rankItem!.integer(0, 65_535);
  const sideA = givenOf(itemA!);
  const sideB = givenOf(itemB!);
  term.check(!sideA === !sideB, () => `"${name}" has a factor on one side only`);
  term.check(!sideA === (rank === 0), () => `"${name}" has rank ${rank} and ${sideA ? "two factors" : "no factor"}`);
  const A = sideA && coefficientsOf(sideA, basesA, rank, tensor);
  const B = sideB && coefficientsOf(sideB, basesB, rank, tensor);
  const ownA = sideA?.own?.maybe((type) => tensor(typeOf(type), rank, inputs));
  const ownBt = sideB?.own?.maybe((type) => tensor(typeOf(type), rank, out));
  const q = privateRankItem!.integer(0, 65_535);
  const most = mostRank(inputs, out);
  term.check(rank + q <= most, () => `"${name}" has rank ${rank + q}, at most ${most} is allowed`);
  privateTypeItem!.integer(0, q > 0 ? DTYPES.length - 1 : 0);
  term.check(rank + q > 0 || !magnitudeItem!.absent, () => `nothing is done to "${name}"`);
  const privateA = q > 0 ? tensor(typeOf(privateTypeItem!), q, inputs) : undefined;
  const privateBt = q > 0 ? tensor(typeOf(privateTypeItem!), q, out) : undefined;
  const magnitude = magnitudeItem!.maybe((code) => tensor(typeOf(code), 1, out));
  return { module: index, rank, A, B, ownA, ownBt, privateRank: q, privateA, privateBt, magnitude };
}

function* parseParameter(parameter: Value, tensor: PlaceNext): Generator<void, TaskParameter> {
  const [nameItem, roleItem, typeItem, shapeItem, indicesItem] = parameter.array(5);
  parameter.check(shapeItem !== undefined, () => "it has fewer than 4 items");
  const name = nameItem!.string(1024);
  const role = ROLES[roleItem!.integer(0, ROLES.length - 1)]!;
  parameter.check(
    (role === "rows") === (indicesItem !== undefined),
    () => `"${name}": numbers of rows belong to role 3, this is ${role}`,
  );
  const shape = shapeItem.array(8).map((d) => d.integer(1, 2 ** 31 - 1));
  parameter.check(shape.length > 0, () => `"${name}" has no shape`);
  parameter.check(role !== "rows" || shape.length === 2, () => `"${name}" needs two dimensions, got [${shape}]`);
  parameter.check(
    (role !== "bias" && role !== "bias-delta") || shape.length === 1,
    () => `"${name}" is a bias, expected one dimension, got [${shape}]`,
  );
  const rows = shape.length === 1 ? 1 : shape[0]!;
  const width = shape.slice(shape.length === 1 ? 0 : 1).reduce((a, b) => a * b, 1);
  parameter.check(Number.isSafeInteger(rows * width), () => `"${name}" is too large: [${shape}]`);
  const indices = indicesItem && (yield* indicesItem.list(shape[0]!, (i) => i.integer(0, 2 ** 31 - 1)));
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
  return { name, role, shape, indices, tensor: tensor(typeOf(typeItem!), rows, width) };
}

/** A tensor, what it is called in errors, and whether its values are multiplied by others. */
type Checked = readonly [name: string, tensor: TensorRef | undefined, multiplied?: boolean];

/** The tensors of the bases section in its order, with what they are called in errors. */
export function* basesTensors(modules: readonly PackModule[]): Generator<Checked> {
  for (const { name, A, B, fingerprint } of modules) {
    for (const [side, bases] of Object.entries({ A, B }))
      for (const [i, { tensor }] of bases.entries()) yield [`basis ${side}${i || ""} of "${name}"`, tensor, true];
    if (fingerprint === undefined) continue;
    const size = { rows: 1, width: FINGERPRINT_SIZE, byteLength: 4 * FINGERPRINT_SIZE };
    yield [`the fingerprint of "${name}"`, { dtype: "f32", byteOffset: fingerprint, ...size }];
  }
}

/** Bound of values that are multiplied by others, so that no ΔW leaves binary32, whatever its K and rank. */
export const MOST = 65_536;

/**
 * Refuses what no tensor may hold (SPEC.md, section 5): NaN and infinity, which would spread to the whole weight and no sum
 * would show where from, and what would become so when multiplied; the integer −2^(b−1); and bits and bytes that mean nothing
 * and are not zero. Works in pieces.
 * @param start where the first tensor may begin
 * @param tensors one behind the other, with what they are called
 * @throws FormatError naming the tensor
 */
export function* checkTensors(
  section: Uint8Array,
  start: number,
  tensors: Iterable<Checked>,
  file: string,
  part: string,
): Generator<void> {
  const f: Fields = new Fields(section, file, part);
  let end = start;
  for (const [name, tensor, multiplied] of tensors) {
    if (!tensor) continue;
    f.zero(end, tensor.byteOffset);
    end = tensor.byteOffset + tensor.byteLength;
    yield* checkTensor(f, tensor, name, multiplied ? MOST : Infinity);
    yield;
  }
}

/** Numbers between two looks at the clock: at most a millisecond. A multiple of 8, whose integers end with a byte. */
const PIECE = 1 << 17;

function* checkTensor(
  f: Fields,
  { dtype, rows, width, byteOffset, byteLength }: TensorRef,
  name: string,
  most: number,
): Generator<void> {
  const bad = (row: number, what: string): never => {
    const large = most === MOST ? `, or ${MOST} and more` : "";
    throw new FormatError(`${name}: ${what} of row ${row} is NaN or infinite${large}`, f);
  };
  const stride = rowBytes(dtype, width);
  const values = byteOffset + scaleBytes(dtype, rows);
  f.zero(values + rows * stride, byteOffset + byteLength);
  if (!isQuantized(dtype)) {
    const step = dtype === "f32" ? 4 : 2;
    // The exponents of infinity, and of 2^16, which halves do not reach.
    const [exponent, least] = dtype === "f16" ? [0x7c00, 0x7c00] : [0x7f80, most === MOST ? 0x4780 : 0x7f80];
    for (let i = 0, at = byteOffset + step - 2; i < rows * width; i++, at += step) {
      if ((f.view.getUint16(at, true) & exponent) >= least) bad(Math.floor(i / width), `value ${i % width}`);
      if (i % PIECE === PIECE - 1) yield;
    }
    return;
  }
  f.zero(byteOffset + 2 * rows, values);
  const least = -(2 ** (BITS[dtype] - 1));
  const spare = 8 * stride - width * BITS[dtype];
  let done = 0;
  for (let row = 0, at = values; row < rows; row++, at += stride) {
    if (!(Math.abs(f16ToF32(f.view.getUint16(byteOffset + 2 * row, true)) * (least + 1)) < most)) bad(row, "the scale");
    for (let from = 0; from < width; from += PIECE) {
      const count = Math.min(PIECE, width - from);
      const found = leastAt(f.bytes, dtype, at + (from / 8) * BITS[dtype], count);
      f.check(
        found === count,
        () => `${name}: integer ${from + found} of row ${row} is ${least}, which is not allowed`,
      );
      if ((done += count) < PIECE) continue;
      done = 0;
      yield;
    }
    f.check(
      f.bytes[at + stride - 1]! >> (8 - spare) === 0,
      () => `${name}: bits behind the last integer of row ${row} are not zero`,
    );
    // A row may have no integer.
    done++;
  }
}
