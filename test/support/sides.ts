/**
 * Writes a pack in other forms: the same tasks with components on one side only, several bases of a side, rows of a
 * task's own instead of coefficients and in addition to them. Uses the vectors' writer, since no writer of the package
 * makes such packs yet.
 */
import type { Dtype, Pack, PackModule, TaskTerm } from "eigenlora";
import { packFile } from "../vectors/format.js";
import { DTYPES, encodeTensor } from "./internals/base.ts";
import { encodedTensor, readTensor, sharedBases } from "./internals/format.ts";
import { expandTerm } from "./internals/pack.ts";

/** Forms that modules get in turn. */
const FORMS = ["A alone", "B alone", "second basis", "difference", "own", "as it was"] as const;

const LAYOUTS = ["out-in", "in-out", "conv", "embedding"];
const ROLES = ["saved", "bias", "bias-delta", "rows"];
const code = (dtype: Dtype): number => DTYPES.indexOf(dtype);

/** True if a form stores rows of a task's own for a factor, and no components. */
const isOwn = (form: string, which: "A" | "B"): boolean =>
  form === "own" || form === `${which === "A" ? "B" : "A"} alone`;

/** @param pack of column bases */
export async function inOtherWords(pack: Pack): Promise<Uint8Array<ArrayBuffer>> {
  if (pack.modules.some(({ A, B }) => [...A, ...B].some(({ kind }) => kind === "flat")))
    throw new TypeError("flat bases are not written in other words");
  using bases = await pack.bases();
  const tensors: Uint8Array[] = [];
  const formOf = (index: number): (typeof FORMS)[number] => FORMS[index % FORMS.length]!;
  const modules = pack.modules.map((module, index) => {
    const form = formOf(index);
    const shared = sharedBases(module);
    const side = (which: "A" | "B"): object | object[] | null => {
      if (!shared || isOwn(form, which)) return null;
      const { K, mean, tensor } = shared[which];
      const stored = encodedTensor(bases.bytes, tensor);
      const map = { kind: 1, K, mean, type: code(tensor.dtype) };
      if (form !== "second basis") {
        tensors.push(stored);
        return map;
      }
      // A basis of another type that no task uses, then the used one.
      tensors.push(encodeTensor("f16", new Float32Array(2 * tensor.width).fill(3), 2, tensor.width), stored);
      return [{ kind: 1, K: 2, mean: false, type: code("f16") }, map];
    };
    const [A, B] = [side("A"), side("B")];
    const { name, out, in: inputs, layout, kernel, fingerprint } = module;
    if (fingerprint !== undefined) tensors.push(bases.bytes.slice(fingerprint, fingerprint + 256));
    const shape = { name, out, in: inputs, layout: LAYOUTS.indexOf(layout), ...(kernel && { kernel: [...kernel] }) };
    return { ...shape, A, B, ...(fingerprint !== undefined && { fingerprint: true }) };
  });
  const tasks = [];
  for (const { id, adapterBytes, metadata } of pack.tasks.values()) {
    const blob = await pack.load(id);
    const brings: string[] = [];
    const own: Uint8Array[] = [];
    const terms = blob.terms.map((term) => {
      const module = pack.modules[term.module]!;
      const { rank, privateRank, privateA, privateBt, magnitude } = term;
      const factors = term.A && term.B ? factorsOf(formOf(term.module), term, module, blob, bases.bytes) : [];
      own.push(...factors.flatMap(({ coefficients }) => coefficients), ...factors.flatMap(({ rows }) => rows));
      for (const [i, { rows }] of factors.entries()) if (rows.length > 0) brings.push(`own-${"AB"[i]} ${module.name}`);
      if (privateA) brings.push(`private ${module.name}`);
      if (magnitude) brings.push(`magnitude ${module.name}`);
      for (const one of [privateA, privateBt, magnitude]) if (one) own.push(encodedTensor(blob.bytes, one));
      const shared = factors.length > 0 ? [rank, ...factors.map(({ item }) => item)] : [0, null, null];
      const types = [privateA ? code(privateA.dtype) : 0, magnitude ? code(magnitude.dtype) : null];
      return [term.module, ...shared, privateRank, ...types];
    });
    const parameters = blob.parameters.map(({ name, role, shape, indices, tensor }) => {
      own.push(encodedTensor(blob.bytes, tensor));
      brings.push(`${role} ${name}`);
      return [name, ROLES.indexOf(role), code(tensor.dtype), [...shape], ...(indices ? [[...indices]] : [])];
    });
    tasks.push({ entry: { id, adapterBytes, metadata, brings }, header: [terms, parameters], tensors: own });
  }
  const { producer, mode, gauge, centering, rank } = pack.directory.basis;
  const basis = { producer, mode, gauge, centering, ...(rank !== undefined && { rank }), modules };
  return packFile({ basis, tensors, tasks } as never) as Uint8Array<ArrayBuffer>;
}

/** Both factors of a term in a form: the item of the header, coefficients, and rows of the task's own. */
function factorsOf(
  form: string,
  term: TaskTerm,
  module: PackModule,
  blob: Parameters<typeof expandTerm>[0],
  bases: Uint8Array,
): { item: unknown; coefficients: Uint8Array[]; rows: Uint8Array[] }[] {
  const bare = { ...term, privateRank: 0, privateA: undefined, privateBt: undefined, magnitude: undefined };
  const whole = expandTerm(blob, bare, module, bases);
  return (["A", "B"] as const).map((which) => {
    const side = term[which]!;
    const [width, values] = which === "A" ? [module.in, whole.A] : [module.out, whole.Bt];
    const over = (dtype: Dtype): number => 1 + (side.mean ? 4 : 0) + 8 * code(dtype);
    const f32 = (rows: Float32Array): Uint8Array => encodeTensor("f32", rows, term.rank, width);
    if (isOwn(form, which)) return { item: [null, 0, code("f32")], coefficients: [], rows: [f32(values)] };
    if (form === "difference") {
      // Coefficients in four bits, and the rest as own rows. Both sides of the term are this one, so that its factor is
      // A.
      const coarse = encodeTensor("int4", readTensor(blob.bytes, side.tensor), term.rank, side.tensor.width);
      const tensor = { ...side.tensor, dtype: "int4", byteOffset: 0, byteLength: coarse.length } as const;
      const both = { ...bare, A: { ...side, tensor }, B: { ...side, tensor } };
      const of = { ...module, A: module[which], B: module[which], in: width, out: width };
      const made = expandTerm({ ...blob, bytes: coarse }, both, of, bases).A;
      const rest = values.map((value, i) => value - made[i]!);
      return { item: [over("int4"), 0, code("f32")], coefficients: [coarse], rows: [f32(rest)] };
    }
    const item = over(side.tensor.dtype);
    const coefficients = [encodedTensor(blob.bytes, side.tensor)];
    return { item: form === "second basis" ? [item, 1, null] : item, coefficients, rows: [] };
  });
}
