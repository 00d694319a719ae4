// @ts-nocheck: it writes what no type allows
/** A small made-up base with tasks, and the values that a reader must find: sums in f64, from the values as stored. */
import { TYPES, tensor } from "./format.js";

/** Numbers from −1 to 1, always the same. */
export function random(seed) {
  let x = seed;
  return () => {
    x ^= x << 13;
    x ^= x >>> 17;
    x ^= x << 5;
    return (x >>> 0) / 2 ** 31 - 1;
  };
}

/**
 * Modules and tasks that grow together: `pack` is the input of `packFile`, `expected` the meaning of its tasks, by
 * name.
 */
export function createModel(seed = 7) {
  const next = random(seed);
  const numbers = (count) => Array.from({ length: count }, next);
  const modules = [];
  const pack = {
    basis: { producer: "test vectors", mode: "column", gauge: "as-trained", centering: "keep", modules: [] },
    tensors: [],
    tasks: [],
  };
  const expected = new Map();

  const basis = (dimension, spec) => {
    const { kind = 1, K, rank, mean = true, type = "f32" } = spec;
    const width = dimension * (rank ?? 1);
    const rows = K + (mean ? 1 : 0);
    const stored = tensor(type, rows, width, numbers(rows * width));
    pack.tensors.push(stored.bytes);
    const map = { kind, K, ...(rank ? { rank } : {}), mean, type: TYPES.indexOf(type), explained: 0.5 };
    return { map, kind, K, rank, mean, width, dimension, values: stored.values };
  };

  /** The bases of a side, and how they are written: none, one, or a list. */
  const side = (dimension, spec) => {
    const bases = [spec ?? []].flat().map((one) => basis(dimension, one));
    const maps = bases.map(({ map }) => map);
    return { bases, map: Array.isArray(spec) ? maps : (maps[0] ?? null) };
  };

  /** A module; without `A` and `B` it has no basis, with a list of them several. */
  function module({ name, out, in: inputs, layout = 0, kernel, A, B = A, fingerprint }) {
    const [ofA, ofB] = [side(inputs, A), side(out, B)];
    if (fingerprint) pack.tensors.push(tensor("f32", 1, 64, numbers(64)).bytes);
    pack.basis.modules.push({
      ...{ name, out, in: inputs, layout, kernel },
      ...{ A: ofA.map, B: ofB.map },
      ...(fingerprint ? { fingerprint: true } : {}),
    });
    modules.push({ name, out, in: inputs, A: ofA.bases, B: ofB.bases });
  }

  /** A factor [rank, dimension] and the same of magnitudes. */
  function factor({ kind, K, mean, dimension, values }, rank, coefficients, useMean) {
    const width = dimension * (kind === 2 ? rank : 1);
    const rows = kind === 2 ? 1 : rank;
    const found = { exact: new Float64Array(rank * dimension), size: new Float64Array(rank * dimension) };
    for (let r = 0; r < rows; r++) {
      for (let i = 0; i < width; i++) {
        const at = r * width + i;
        for (let k = 0; k < K; k++) {
          const product = coefficients[r * K + k] * values[k * width + i];
          found.exact[at] += product;
          found.size[at] += Math.abs(product);
        }
        if (!mean || !useMean) continue;
        found.exact[at] += values[K * width + i];
        found.size[at] += Math.abs(values[K * width + i]);
      }
    }
    return found;
  }

  /**
   * Adds a task. Terms: `{ module, rank, type, meanA, meanB, A, B, q, privateType, magnitudeType }`; parameters: `{
   * name, role, type, shape, indices }`. `A` and `B` are `{ basis, own }`: the basis of the coefficients (null: none),
   * and the type of rows of its own. Expected are `ID/MODULE/delta`, `…/bound` (the tolerance of each element) and
   * `…/magnitude`, and `ID/PARAMETER`.
   */
  function task(id, terms, parameters = [], entry = {}) {
    const tensors = [];
    const values = [];
    const store = (type, rows, width) => {
      const stored = tensor(type, rows, width, numbers(rows * width));
      tensors.push(stored.bytes);
      return stored.values;
    };
    const header = [
      terms.map((term) => {
        const { module: index, rank = 0, type = "f32", q = 0, privateType = "f32", magnitudeType } = term;
        const { name, out, in: inputs, A: basesA, B: basesB } = modules[index];
        /** Both factors: the basis of the coefficients, if any, and the type of rows of its own. */
        const sides = [
          { width: inputs, bases: basesA, useMean: term.meanA ?? true, ...term.A },
          { width: out, bases: basesB, useMean: term.meanB ?? true, ...term.B },
        ].map((side) => {
          const { basis: which = 0 } = side;
          return { ...side, which: which ?? 0, of: rank > 0 && which !== null ? side.bases[which] : undefined };
        });
        const delta = new Float64Array(out * inputs);
        const bound = new Float64Array(out * inputs);
        const add = ([a, b], count) => {
          for (let k = 0; k < count; k++) {
            for (let o = 0; o < out; o++) {
              for (let i = 0; i < inputs; i++) {
                delta[o * inputs + i] += b.exact[k * out + o] * a.exact[k * inputs + i];
                bound[o * inputs + i] += b.size[k * out + o] * a.size[k * inputs + i];
              }
            }
          }
        };
        if (rank > 0) {
          for (const side of sides) if (side.of) side.alpha = store(type, side.of.kind === 2 ? 1 : rank, side.of.K);
          for (const side of sides) if (side.own) side.rows = store(side.own, rank, side.width);
          const whole = ({ of, alpha, useMean, rows, width }) => {
            const zeros = { exact: new Float64Array(rank * width), size: new Float64Array(rank * width) };
            const { exact, size } = of ? factor(of, rank, alpha, useMean) : zeros;
            rows?.forEach((value, i) => ((exact[i] += value), (size[i] += Math.abs(value))));
            return { exact, size };
          };
          add(sides.map(whole), rank);
        }
        if (q > 0) {
          const own = sides.map(({ width }) => store(privateType, q, width));
          add(
            own.map((exact) => ({ exact, size: exact.map(Math.abs) })),
            q,
          );
        }
        const share = 2 ** -24 * (sides.reduce((sum, { of }) => sum + (of?.K ?? 0), 0) + rank + q + 16);
        expected.set(`${id}/${name}/delta`, { shape: [out, inputs], values: delta });
        expected.set(`${id}/${name}/bound`, { shape: [out, inputs], values: bound.map((size) => size * share) });
        if (magnitudeType)
          expected.set(`${id}/${name}/magnitude`, { shape: [out], values: store(magnitudeType, 1, out) });
        const written = ({ of, which, useMean, own }) => {
          const coded = of ? of.kind + (useMean && of.mean ? 4 : 0) + 8 * TYPES.indexOf(type) : null;
          return own || which ? [coded, which, own ? TYPES.indexOf(own) : null] : coded;
        };
        const shared = rank > 0 ? sides.map(written) : [null, null];
        const magnitude = magnitudeType ? TYPES.indexOf(magnitudeType) : null;
        return [index, rank, ...shared, q, q > 0 ? TYPES.indexOf(privateType) : 0, magnitude];
      }),
      parameters.map(({ name, role, type = "f32", shape, indices }) => {
        const [rows, width] =
          shape.length === 1 ? [1, shape[0]] : [shape[0], shape.slice(1).reduce((a, b) => a * b, 1)];
        values.push(store(type, rows, width));
        expected.set(`${id}/${name}`, { shape, values: values.at(-1) });
        return [name, role, TYPES.indexOf(type), shape, ...(indices ? [indices] : [])];
      }),
    ];
    const made = { entry: { id, adapterBytes: 0, ...entry }, header, tensors };
    // Values in the order of the header, since two roles of a parameter share a name in `expected`.
    Object.defineProperty(made, "values", { value: values });
    pack.tasks.push(made);
    return made;
  }

  return { pack, expected, module, task };
}

/** Names of the two kinds of brought things in a header, for an entry's `brings`. */
export function bringsOf({ header: [terms, parameters] }, { basis }) {
  const roles = ["saved", "bias", "bias-delta", "rows"];
  const name = ([index]) => basis.modules[index].name;
  return [
    ...parameters.map(([parameter, role]) => `${roles[role]} ${parameter}`),
    ...terms.filter((term) => term[6] !== null).map((term) => `magnitude ${name(term)}`),
    ...terms.filter((term) => term[4] > 0).map((term) => `private ${name(term)}`),
    ...terms.filter((term) => Array.isArray(term[2]) && term[2][2] !== null).map((term) => `own-A ${name(term)}`),
    ...terms.filter((term) => Array.isArray(term[3]) && term[3][2] !== null).map((term) => `own-B ${name(term)}`),
  ];
}

/** Named arrays as a safetensors file, of F64 where they have no type and bytes. */
export function safetensors(tensors) {
  const header = {};
  let end = 0;
  for (const [name, { shape, values, type = "f64", bytes }] of tensors) {
    header[name] = {
      dtype: type.toUpperCase(),
      shape,
      data_offsets: [end, (end += bytes?.length ?? 8 * values.length)],
    };
  }
  let text = JSON.stringify(header);
  while (text.length % 8) text += " ";
  const head = new TextEncoder().encode(text);
  const bytes = new Uint8Array(8 + head.length + end);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, head.length, true);
  bytes.set(head, 8);
  let at = 8 + head.length;
  for (const { values, bytes: stored } of tensors.values()) {
    if (stored) bytes.set(stored, at), (at += stored.length);
    else for (const value of values) view.setFloat64(at, value, true), (at += 8);
  }
  return bytes;
}
