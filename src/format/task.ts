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
  if (bytes.length < 8 || f.u32(0) !== TASK_BLOB_MAGIC) f.fail("this is not a task blob");
  const headerLength = f.u32(4);
  if (headerLength > bytes.length - 8) f.fail(`a header of ${headerLength} bytes in a blob of ${bytes.length}`);
  const root = (yield* decode(bytes.subarray(8, 8 + headerLength), file, f.part, "header")).items(2);
  const { place: tensor, full } = placing(4, 8 + headerLength, bytes.length, file, f.part);
  let last = -1;
  const terms = yield* root[0]!.list(65_536, (term: Value) => {
    const parsed = parseTerm(term, modules, tensor);
    if (parsed.module <= last) term.fail("terms are not sorted by module");
    last = parsed.module;
    return parsed;
  });
  const names = new Set<string>();
  const parameters: TaskParameter[] = [];
  for (const parameter of root[1]!.each(65_536)) {
    const parsed = yield* parseParameter(parameter, tensor);
    const key = `${parsed.role} ${parsed.name}`;
    if (names.has(key)) f.fail(`"${parsed.name}" is there twice`);
    names.add(key);
    parameters.push(parsed);
    yield;
  }
  const adapted = new Set(terms.map(({ module }) => `${modules[module]!.name}.weight`));
  for (const { name, role } of parameters) {
    const twice =
      ((role === "saved" || role === "rows") && adapted.has(name)) || (role !== "saved" && names.has(`saved ${name}`));
    if (twice) f.fail(`it changes "${name}" in two ways`);
  }
  full();
  yield* checkTensors(bytes, 8 + headerLength, taskTensors(terms, parameters, modules), file, f.part);
  const blob = { terms, parameters, bytes };
  if (brings) {
    // Models are prepared for what the directory says. Many tasks may share one list, so it is not gone through where the count differs.
    const found = bringsOf(blob, modules);
    if (found.length !== brings.length)
      f.fail(`it brings ${found.length} parameters and modules, the directory says ${brings.length}`);
    const said = new Set(brings);
    // The lists are equally long, so an unsaid entry means that a said one is missing.
    for (const entry of found)
      if (!said.delete(entry)) f.fail(`it brings "${entry}", which the directory does not say`);
  }
  return blob;
}

/** The tensors of a term in the order of the blob, and what they are called in errors. */
const TENSORS = {
  A: "A",
  B: "B",
  ownA: "own A",
  ownBt: "own B",
  privateA: "private A",
  privateBt: "private B",
  magnitude: "magnitude",
} as const;

/** Lists tensors in the order of the blob, with what they are called in errors. */
export function* taskTensors(
  terms: readonly TaskTerm[],
  parameters: readonly TaskParameter[],
  modules: readonly PackModule[],
): Generator<Checked> {
  for (const term of terms) {
    for (const [key, what] of Object.entries(TENSORS)) {
      const found = term[key as keyof typeof TENSORS];
      const tensor = found && "tensor" in found ? found.tensor : found;
      yield [`${what} of "${modules[term.module]!.name}"`, tensor, true];
    }
  }
  for (const { name, tensor } of parameters) yield [`"${name}"`, tensor];
}

/** Says where the next tensor lies. */
type PlaceNext = (dtype: Dtype, rows: number, width: number) => TensorRef;

/**
 * @param given coefficients, the number of their basis, the type of residual rows; coefficients alone are over the first basis
 */
function coefficientsOf(
  [item, which, own]: readonly Value[],
  bases: readonly Side[],
  rank: number,
  tensor: PlaceNext,
): Coefficients | undefined {
  const code: Value = item!;
  const index = which?.integer(0, code.absent ? 0 : 65_535) ?? 0;
  if (code.absent) {
    if (!own || own.absent) code.fail("it has neither coefficients nor rows of its own");
    return undefined;
  }
  const bits = code.integer(0, 8 * DTYPES.length - 1);
  const kind = bits & 3;
  const basis = bases[index];
  if (!basis || kind !== (basis.kind === "column" ? 1 : 2))
    code.fail(`coefficients of kind ${kind} for a basis of kind ${basis?.kind ?? "none"}`);
  const mean = (bits & 4) !== 0;
  if (mean && !basis.mean) code.fail("a mean is asked for, but the basis has none");
  if (basis.rank !== undefined && rank !== basis.rank)
    code.fail(`rank ${rank}, but the basis is ${basis.kind} of rank ${basis.rank}`);
  return { basis: index, mean, tensor: tensor(DTYPES[bits >> 3]!, basis.kind === "column" ? rank : 1, basis.K) };
}

function parseTerm(term: Value, modules: readonly PackModule[], tensor: PlaceNext): TaskTerm {
  const [moduleItem, rankItem, itemA, itemB, privateRankItem, privateTypeItem, magnitudeItem] = term.items(7);
  const index = moduleItem!.integer(0, modules.length - 1);
  const { name, in: inputs, out, A: basesA, B: basesB } = modules[index]!;
  const rank = rankItem!.integer(0, 65_535);
  const [sideA, sideB] = [itemA!, itemB!].map((item) =>
    item.absent ? undefined : item.kind === "array" ? item.items(3) : [item],
  );
  if (!sideA !== !sideB) term.fail(`"${name}" has a factor on one side only`);
  if (!sideA !== (rank === 0)) term.fail(`"${name}" has rank ${rank} and ${sideA ? "two factors" : "no factor"}`);
  const A = sideA && coefficientsOf(sideA, basesA, rank, tensor);
  const B = sideB && coefficientsOf(sideB, basesB, rank, tensor);
  const ownA = sideA?.[2]?.maybe((type) => tensor(type.choice(DTYPES), rank, inputs));
  const ownBt = sideB?.[2]?.maybe((type) => tensor(type.choice(DTYPES), rank, out));
  const q = privateRankItem!.integer(0, 65_535);
  const most = mostRank(inputs, out);
  if (rank + q > most) term.fail(`"${name}" has rank ${rank + q}, at most ${most} is allowed`);
  const type = privateTypeItem!.choice(q > 0 ? DTYPES : DTYPES.slice(0, 1));
  if (rank + q === 0 && magnitudeItem!.absent) term.fail(`nothing is done to "${name}"`);
  const privateA = q > 0 ? tensor(type, q, inputs) : undefined;
  const privateBt = q > 0 ? tensor(type, q, out) : undefined;
  const magnitude = magnitudeItem!.maybe((code) => tensor(code.choice(DTYPES), 1, out));
  return { module: index, rank, A, B, ownA, ownBt, privateRank: q, privateA, privateBt, magnitude };
}

function* parseParameter(parameter: Value, tensor: PlaceNext): Generator<void, TaskParameter> {
  const [nameItem, roleItem, typeItem, shapeItem, indicesItem] = parameter.array(5);
  if (shapeItem === undefined) parameter.fail("it has fewer than 4 items");
  const name = nameItem!.string(1024);
  const role = roleItem!.choice(ROLES);
  if ((role === "rows") !== (indicesItem !== undefined))
    parameter.fail(`"${name}": numbers of rows belong to role 3, this is ${role}`);
  const shape = shapeItem.array(8).map((d) => d.integer(1, 2 ** 31 - 1));
  const dimensions = role === "saved" ? shape.length : role === "rows" ? 2 : 1;
  if (shape.length === 0 || shape.length !== dimensions)
    parameter.fail(`"${name}" (${role}) has the shape [${shape}], expected ${dimensions || "1 to 8"} dimensions`);
  const rows = shape.length === 1 ? 1 : shape[0]!;
  const width = shape.slice(shape.length === 1 ? 0 : 1).reduce((a, b) => a * b, 1);
  if (!Number.isSafeInteger(rows * width)) parameter.fail(`"${name}" is too large: [${shape}]`);
  const indices = indicesItem && (yield* indicesItem.list(rows, (i) => i.integer(0, 2 ** 31 - 1)));
  if (indices && (indices.length !== rows || indices.some((v, i) => i > 0 && v <= indices[i - 1]!)))
    parameter.fail(`"${name}": ${indices.length} rows are named, expected ${rows} in ascending order`);
  return { name, role, shape, indices, tensor: tensor(typeItem!.choice(DTYPES), rows, width) };
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
      if (found !== count) f.fail(`${name}: integer ${from + found} of row ${row} is ${least}, which is not allowed`);
      if ((done += count) < PIECE) continue;
      done = 0;
      yield;
    }
    if (f.bytes[at + stride - 1]! >> (8 - spare) !== 0)
      f.fail(`${name}: bits behind the last integer of row ${row} are not zero`);
    // A row may have no integer.
    done++;
  }
}
