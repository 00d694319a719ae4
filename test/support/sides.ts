/**
 * Writes a pack in other forms: the same tasks with components on one side only, several bases of a side, rows of a task's own instead of
 * coefficients and in addition to them. Uses the vectors' writer, since no writer of the package makes such packs yet.
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

/** @param pack of column bases */
export async function inOtherWords(pack: Pack): Promise<Uint8Array<ArrayBuffer>> {
  using bases = await pack.bases();
  const tensors: Uint8Array[] = [];
  const formOf = (index: number): (typeof FORMS)[number] => FORMS[index % FORMS.length]!;
  const modules = pack.modules.map((module, index) => {
    const form = formOf(index);
    const shared = sharedBases(module);
    const side = (which: "A" | "B"): object | object[] | null => {
      if (!shared || form === "own" || form === `${which === "A" ? "B" : "A"} alone`) return null;
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
      const item = termOf(formOf(term.module), term, module);
      for (const [which, factor] of [
        ["A", item[2]],
        ["B", item[3]],
      ] as const)
        if (Array.isArray(factor) && factor[2] !== null) brings.push(`own-${which} ${module.name}`);
      if (term.privateA) brings.push(`private ${module.name}`);
      if (term.magnitude) brings.push(`magnitude ${module.name}`);
      own.push(...tensorsOf(formOf(term.module), term, module));
      return item;

      function tensorsOf(form: string, { A, B, privateA, privateBt, magnitude }: TaskTerm, of: PackModule) {
        const [coefficients, rows]: [Uint8Array[], Uint8Array[]] = [[], []];
        if (A && B) {
          const whole = expandTerm(
            blob,
            { ...term, privateRank: 0, privateA: undefined, privateBt: undefined },
            of,
            bases.bytes,
          );
          for (const [which, side, width, values] of [
            ["A", A, of.in, whole.A],
            ["B", B, of.out, whole.Bt],
          ] as const) {
            const alone = form === "own" || form === `${which === "A" ? "B" : "A"} alone`;
            if (alone) rows.push(encodeTensor("f32", values, term.rank, width));
            else if (form === "difference") {
              // Coefficients in four bits, and the rest as own rows.
              const alpha = readTensor(blob.bytes, side.tensor);
              const coarse = encodeTensor("int4", alpha, term.rank, side.tensor.width);
              coefficients.push(coarse);
              const made = rough(coarse, side, of, which);
              rows.push(
                encodeTensor(
                  "f32",
                  values.map((value, i) => value - made[i]!),
                  term.rank,
                  width,
                ),
              );
            } else coefficients.push(encodedTensor(blob.bytes, side.tensor));
          }
        }
        const more = [privateA, privateBt, magnitude].flatMap((one) => (one ? [encodedTensor(blob.bytes, one)] : []));
        return [...coefficients, ...rows, ...more];
      }

      function rough(coarse: Uint8Array, side: NonNullable<TaskTerm["A"]>, of: PackModule, which: "A" | "B") {
        const tensor = {
          dtype: "int4",
          rows: term.rank,
          width: side.tensor.width,
          byteOffset: 0,
          byteLength: coarse.length,
        } as const;
        const bare = { ...term, privateRank: 0, privateA: undefined, privateBt: undefined, magnitude: undefined };
        const some = { ...bare, A: { ...side, tensor }, B: { ...side, tensor } };
        const both = {
          ...of,
          A: of[which],
          B: of[which],
          in: of[which === "A" ? "in" : "out"],
          out: of[which === "A" ? "in" : "out"],
        };
        return expandTerm({ ...blob, bytes: coarse }, some, both, bases.bytes).A;
      }
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

/** Writes a term. */
function termOf(form: (typeof FORMS)[number], term: TaskTerm, { A, B }: PackModule): unknown[] {
  const { module, rank, privateRank, privateA, magnitude } = term;
  const factor = (which: "A" | "B"): unknown => {
    const side = term[which];
    if (!side) return null;
    const mean = side.mean ? 4 : 0;
    const over = 1 + mean + 8 * code(side.tensor.dtype);
    if (form === "own" || form === `${which === "A" ? "B" : "A"} alone`) return [null, 0, code("f32")];
    if (form === "difference") return [1 + mean + 8 * code("int4"), 0, code("f32")];
    return form === "second basis" ? [over, 1, null] : over;
  };
  if ([...A, ...B].some(({ kind }) => kind === "flat"))
    throw new TypeError("flat bases are not written in other words");
  const factors = term.A && term.B ? [rank, factor("A"), factor("B")] : [0, null, null];
  return [
    module,
    ...factors,
    privateRank,
    privateA ? code(privateA.dtype) : 0,
    magnitude ? code(magnitude.dtype) : null,
  ];
}
