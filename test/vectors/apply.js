// @ts-nocheck: it writes what no type describes
/**
 * The vectors of SPEC.md, section 6.3: packs, bases, and what the parameters become, in 64 bits. Where an item of a
 * task goes is written down for each vector by hand.
 */
import { packFile, tensor } from "./format.js";
import { createModel, random, safetensors } from "./model.js";

const size = (shape) => shape.reduce((a, b) => a * b, 1);

/** A base of made-up numbers. @param shapes by name @returns `{ type, shape, values, bytes }` by name */
function baseOf(shapes, type = "f32", seed = 77) {
  const next = random(seed);
  return new Map(
    Object.entries(shapes).map(([name, shape]) => {
      const count = size(shape);
      const { bytes, values } = tensor(
        type,
        1,
        count,
        Array.from({ length: count }, () => next()),
      );
      return [name, { type, shape, values, bytes: bytes.subarray(0, count * (type === "f32" ? 4 : 2)) }];
    }),
  );
}

/** Puts other values into a parameter of a base. */
function put(base, name, edit) {
  const one = base.get(name);
  edit(one.values);
  const { bytes, values } = tensor(one.type, 1, one.values.length, one.values);
  base.set(name, { ...one, values, bytes: bytes.subarray(0, one.bytes.length) });
}

const DIGITS = { f32: 23, f16: 10, bf16: 7 };
const LEAST = { f32: -126, f16: -14, bf16: -126 };
/** A unit in the last place of numbers of a type that are as large as `x`. */
const ulp = (x, type) => 2 ** (Math.max(Math.floor(Math.log2(Math.abs(x) || 1e-300)), LEAST[type]) - DIGITS[type]);
const rounded = (values, type) => (type === "f32" ? values : tensor(type, 1, values.length, values).values);

/** W + ΔW of a module with the bound of its elements, before rounding. */
function adapted({ out, in: inputs, layout = 0 }, { delta, bound, magnitude }, { values, type }) {
  const at = (o, i) => (layout === 1 || layout === 3 ? i * out + o : o * inputs + i);
  const [exact, off] = [new Float64Array(out * inputs), new Float64Array(out * inputs)];
  for (let o = 0; o < out; o++) {
    const row = Array.from({ length: inputs }, (_, i) => values[at(o, i)] + delta[o * inputs + i]);
    const slack = Array.from({ length: inputs }, (_, i) => bound[o * inputs + i] + 2 ** -24 * Math.abs(row[i]));
    const norm = Math.hypot(...row);
    const whole = Math.hypot(...slack);
    const m = magnitude?.[o];
    row.forEach((value, i) => {
      const found = m === undefined ? value : norm > 0 ? (m * value) / norm : 0;
      const share = norm > 0 ? (slack[i] + whole) / norm + 2 ** -24 * (inputs + 8) : 0;
      const error = m === undefined ? bound[o * inputs + i] : Math.abs(m) * share;
      exact[at(o, i)] = found;
      // A row without a value stays one, and nothing is rounded there.
      off[at(o, i)] = norm > 0 ? error + 1.5 * ulp(Math.abs(found) + error, type) : 0;
    });
  }
  return { exact, off };
}

/**
 * Computes the parameters under a task.
 * @param places names in the base, where they are others than in the pack
 */
function applied({ pack, expected }, { entry: { id }, header: [terms, parameters], values: given }, base, places) {
  const result = new Map([...base].map(([name, { shape, values }]) => [name, { shape, values }]));
  const place = (name) => places[name] ?? name;
  const bounds = new Map();
  for (const [index] of terms) {
    const module = pack.basis.modules[index];
    const name = place(`${module.name}.weight`);
    const [delta, bound, magnitude] = ["delta", "bound", "magnitude"].map(
      (what) => expected.get(`${id}/${module.name}/${what}`)?.values,
    );
    const { exact, off } = adapted(module, { delta, bound, magnitude }, base.get(name));
    result.set(name, { shape: base.get(name).shape, values: exact });
    bounds.set(name, off);
  }
  // Differences come last: with both roles a bias is the sum of both tensors.
  const order = parameters
    .map((one, i) => [...one.slice(0, 4), one[4], given[i]])
    .sort((a, b) => (a[1] === 2) - (b[1] === 2));
  for (const [own, role, , shape, indices, values] of order) {
    const name = place(own);
    const type = base.get(name)?.type ?? "f32";
    const before = result.get(name);
    if (role === 2) {
      const sum = before.values.map((value, i) => value + values[i]);
      result.set(name, { shape, values: sum });
      bounds.set(
        name,
        sum.map((value) => 1.5 * ulp(value, type)),
      );
    } else if (role === 3) {
      const all = before.values.slice();
      indices.forEach((row, i) => {
        all.set(rounded(values.subarray(i * shape[1], (i + 1) * shape[1]), type), row * shape[1]);
      });
      result.set(name, { ...before, values: all });
    } else result.set(name, { shape, values: rounded(values, type) });
  }
  const found = new Map();
  for (const [name, one] of result) {
    found.set(`${id}/${name}`, one);
    if (bounds.has(name)) found.set(`${id}/${name}/bound`, { shape: one.shape, values: bounds.get(name) });
  }
  return found;
}

/** Stores the fingerprint of a module, whose tensor is `index` of the bases. */
function fingerprint({ tensors }, index, { name, out, in: inputs, layout = 0 }, { values }) {
  let x = 0x811c9dc5;
  for (const byte of new TextEncoder().encode(name)) x = Math.imul(x ^ byte, 0x01000193) >>> 0;
  const draw = (n) => {
    x ^= x << 13;
    x ^= x >>> 17;
    x ^= x << 5;
    return (x >>> 0) % n;
  };
  const view = new DataView(tensors[index].buffer);
  for (let i = 0; i < 64; i++) {
    const o = draw(out);
    const n = draw(inputs);
    view.setFloat32(4 * i, values[layout === 1 || layout === 3 ? n * out + o : o * inputs + n], true);
  }
}

/** Every layout, every way a factor is made, magnitudes and every role. */
function kinds() {
  const model = createModel(31);
  const { pack, module, task } = model;
  const modules = [
    { name: "linear", out: 5, in: 7, A: { K: 3 }, fingerprint: true },
    { name: "turned", out: 4, in: 6, layout: 1, A: { K: 2, type: "f16" } },
    { name: "conv", out: 3, in: 12, layout: 2, kernel: [2, 3], A: { kind: 2, K: 2, rank: 2, type: "int8" } },
    { name: "words", out: 4, in: 9, layout: 3, A: { K: 3, type: "int4" } },
    { name: "groups", out: 6, in: 5, A: [{ K: 2 }, { K: 3, mean: false }], B: [{ K: 1 }, { K: 4 }] },
    { name: "left", out: 5, in: 5, A: { K: 4, type: "bf16" }, B: null },
    { name: "alone", out: 3, in: 4 },
  ];
  for (const one of modules) module(one);
  const shapes = {
    "linear.weight": [5, 7],
    "turned.weight": [6, 4],
    "conv.weight": [3, 2, 2, 3],
    "words.weight": [9, 4],
    "groups.weight": [6, 5],
    "left.weight": [5, 5],
    "alone.weight": [3, 4],
    "head.weight": [2, 5],
    "head.bias": [2],
    "norm.bias": [6],
    "gate.bias": [4],
    "tokens.weight": [8, 3],
    "other.weight": [2, 2],
  };
  fingerprint(pack, 2, modules[0], baseOf(shapes).get("linear.weight"));
  task("terms", [
    { module: 0, rank: 2 },
    { module: 1, rank: 3, type: "int8" },
    { module: 2, rank: 2, type: "f16" },
    { module: 3, rank: 2, q: 1, privateType: "f16" },
    { module: 4, rank: 2, A: { basis: 1 }, B: { basis: 1, own: "f16" } },
    { module: 5, rank: 2, B: { basis: null, own: "int8" } },
    { module: 6, q: 2, privateType: "int4" },
  ]);
  task(
    "magnitudes",
    [
      { module: 0, rank: 1, meanA: false, magnitudeType: "f32" },
      { module: 1, rank: 1, q: 1, magnitudeType: "f16" },
      { module: 2, rank: 2, magnitudeType: "bf16" },
      { module: 3, rank: 1, magnitudeType: "f32" },
      { module: 6, magnitudeType: "f32" },
    ],
    [],
  );
  task(
    "parameters",
    [],
    [
      { name: "head.weight", role: 0, shape: [3, 5], type: "int8" },
      { name: "head.bias", role: 0, shape: [3] },
      { name: "new.weight", role: 0, shape: [2, 3], type: "f16" },
      { name: "norm.bias", role: 1, shape: [6], type: "f32" },
      { name: "gate.bias", role: 2, shape: [4], type: "f32" },
      { name: "tokens.weight", role: 3, shape: [2, 3], indices: [1, 7], type: "f32" },
    ],
  );
  // The base's bias is so large that base + (task − base) would lose the task's.
  task(
    "both roles",
    [{ module: 0, rank: 1 }],
    [
      { name: "gate.bias", role: 2, shape: [4] },
      { name: "gate.bias", role: 1, shape: [4] },
    ],
  );
  const bases = ["f32", "f16", "bf16"].map((type) => {
    const base = baseOf(shapes, type);
    put(base, "gate.bias", (values) => values.fill(4096));
    // A row without a value, which magnitudes leave so.
    put(base, "alone.weight", (values) => values.fill(0, 4, 8));
    return { name: type, base, why: `every layout, kind of term and role, on a base of ${type}` };
  });
  return { model, bases };
}

const SEGMENTS = "p.".repeat(64);

/** Names that differ from the base's. */
function names() {
  const model = createModel(32);
  const layer = { out: 3, in: 2, A: { K: 1 } };
  const called = [
    "exact.layer",
    "encoder.query",
    "model.decoder.key",
    "a.b.c.value",
    "deep.dense",
    `${SEGMENTS}q.layer`,
  ];
  for (const name of called) model.module({ name, ...layer });
  model.task(
    "names",
    called.map((_, module) => ({ module, rank: 1 })),
    [
      { name: "classifier.weight", role: 0, shape: [2, 2] },
      { name: "scale", role: 0, shape: [2] },
      { name: "other.gamma", role: 0, shape: [2] },
      { name: "pre.norm.bias", role: 1, shape: [3] },
      { name: "norm.bias", role: 2, shape: [3] },
      { name: "words.weight", role: 3, shape: [1, 2], indices: [2] },
    ],
  );
  const base = baseOf({
    ...{ "exact.layer.weight": [3, 2], "x.exact.layer.weight": [3, 2] },
    "bert.encoder.query.weight": [3, 2],
    "decoder.key.weight": [3, 2],
    ...{ "b.c.value.weight": [3, 2], "c.value.weight": [3, 2], "value.weight": [3, 2] },
    ...{ "top.deep.dense.weight": [3, 2], "dense.weight": [3, 2] },
    "q.layer.weight": [3, 2],
    "head.classifier.weight": [3, 2],
    "x.scale": [2],
    gamma: [2],
    "norm.bias": [3],
    ...{ "model.words.weight": [4, 2], "model.swords.weight": [4, 2] },
  });
  const places = {
    "encoder.query.weight": "bert.encoder.query.weight",
    "model.decoder.key.weight": "decoder.key.weight",
    "a.b.c.value.weight": "b.c.value.weight",
    "deep.dense.weight": "top.deep.dense.weight",
    [`${SEGMENTS}q.layer.weight`]: "q.layer.weight",
    "classifier.weight": "head.classifier.weight",
    scale: "x.scale",
    "pre.norm.bias": "norm.bias",
    "words.weight": "model.words.weight",
  };
  return { model, bases: [{ base, places, why: "names with more segments in front than the base's, and with fewer" }] };
}

/** Weights that a model ties: stored once, or twice. */
function tied() {
  const model = createModel(33);
  model.task("rows", [], [{ name: "words.weight", role: 3, shape: [2, 3], indices: [0, 3] }]);
  model.task(
    "both",
    [],
    [
      { name: "words.weight", role: 3, shape: [1, 3], indices: [2] },
      { name: "head.weight", role: 3, shape: [1, 3], indices: [2] },
    ],
  );
  const shapes = { "words.weight": [5, 3], "norm.weight": [3] };
  const twice = baseOf({ ...shapes, "head.weight": [5, 3] });
  twice.set("head.weight", twice.get("words.weight"));
  return {
    model,
    bases: [
      {
        ...{ name: "once", base: baseOf(shapes), why: "tied weights that the base stores once" },
        refused: { both: "rows of a parameter that the base lacks" },
      },
      {
        name: "twice",
        base: twice,
        only: ["both"],
        why: "tied weights that the base stores twice: the task names both",
      },
    ],
  };
}

/** Rows of an embedding, and a head of the task's own where the base ties one. */
function tiedHead() {
  const model = createModel(39);
  model.task(
    "head",
    [],
    [
      { name: "words.weight", role: 3, shape: [2, 3], indices: [0, 3] },
      { name: "head.weight", role: 0, shape: [5, 3] },
    ],
  );
  const base = baseOf({ "words.weight": [5, 3], "head.weight": [5, 3] });
  base.set("head.weight", base.get("words.weight"));
  return { model, bases: [{ base, why: "a tied head that the task replaces gets no rows" }] };
}

/** Parameters that must be refused, each in a task of its own, and a task that must not. */
function parameters() {
  const model = createModel(34);
  model.module({ name: "layer", out: 3, in: 2, A: { K: 1 } });
  const head = { role: 0, shape: [2, 2] };
  const rows = { role: 3, shape: [1, 2], indices: [1] };
  const bias = { role: 1, shape: [3] };
  const refused = {};
  const refuse = (id, why, given, terms = []) => {
    model.task(id, terms, given);
    refused[id] = why;
  };
  model.task("fine", [{ module: 0, rank: 1 }], [{ name: "norm.bias", ...bias }]);
  const twice = (name, how) => [
    { name, ...how },
    { name: `x.${name}`, ...how },
  ];
  refuse("two heads", "two parameters of role 0 fit one of the base", twice("head.weight", head));
  refuse("two rows", "two parameters of role 3 fit one of the base", twice("words.weight", rows));
  refuse("two biases", "two parameters of role 1 fit one of the base", twice("norm.bias", bias));
  refuse("two differences", "two parameters of role 2 fit one of the base", twice("norm.bias", { ...bias, role: 2 }));
  refuse("head and bias", "roles 0 and 1 fit one parameter of the base", [
    { name: "norm.bias", role: 0, shape: [3] },
    { name: "x.norm.bias", ...bias },
  ]);
  const term = [{ module: 0, rank: 1 }];
  refuse(
    "head and term",
    "a term and role 0 fit one parameter",
    [{ name: "x.layer.weight", role: 0, shape: [3, 2] }],
    term,
  );
  refuse("rows and term", "a term and role 3 fit one parameter", [{ name: "x.layer.weight", ...rows }], term);
  refuse("several heads", "role 0, which fits several parameters", [{ name: "twin.weight", ...head }]);
  refuse("several biases", "role 1, which fits several parameters", [{ name: "twin.bias", ...bias }]);
  refuse("no bias", "role 1 of a parameter that the base lacks", [{ name: "absent.bias", ...bias }]);
  refuse("no difference", "role 2 of a parameter that the base lacks", [{ name: "absent.bias", ...bias, role: 2 }]);
  refuse("no rows", "role 3 of a parameter that the base lacks", [{ name: "absent.weight", ...rows }]);
  refuse("one segment", "role 1: one segment of a longer name does not fit", [{ name: "layer.gamma", ...bias }]);
  refuse("part of a segment", "role 1: part of a segment does not fit", [{ name: "orm.bias", ...bias }]);
  refuse("bias shape", "role 1 of another shape", [{ name: "norm.bias", ...bias, shape: [2] }]);
  refuse("difference shape", "role 2 of another shape", [{ name: "norm.bias", role: 2, shape: [4] }]);
  refuse("row width", "rows of another width", [{ name: "words.weight", ...rows, shape: [1, 3] }]);
  refuse("row number", "a row beyond the table", [{ name: "words.weight", ...rows, indices: [4] }]);
  refuse("rows of a vector", "rows of a parameter of one dimension", [{ name: "norm.bias", ...rows }]);
  const base = baseOf({
    ...{ "x.layer.weight": [3, 2], "x.head.weight": [2, 2], "x.words.weight": [4, 2], "x.norm.bias": [3], gamma: [3] },
    ...{ "a.twin.weight": [2, 2], "b.twin.weight": [2, 2], "a.twin.bias": [3], "b.twin.bias": [3] },
  });
  const places = { "layer.weight": "x.layer.weight", "norm.bias": "x.norm.bias" };
  return { model, bases: [{ base, places, refused, why: "parameters that do not fit the base" }] };
}

/** A pack of a task that adapts all modules, and bases that must be refused. @param bases shapes by name, by reason */
function misfits(seed, modules, bases) {
  const model = createModel(seed);
  for (const one of modules) model.module({ A: { K: 1 }, ...one });
  model.task(
    "task",
    modules.map((_, module) => ({ module, rank: 1 })),
  );
  return {
    model,
    bases: Object.entries(bases).map(([name, [why, shapes]]) => {
      return { name, base: baseOf(shapes), refused: { task: why }, why };
    }),
  };
}

const linear = { name: "some.layer", out: 3, in: 2 };

/** Vectors by name of their pack: `{ model, bases: [{ name, base, places, refused, only, why }] }`. */
const APPLY = {
  kinds,
  names,
  tied,
  "tied-head": tiedHead,
  parameters,
  linear: () =>
    misfits(35, [linear], {
      missing: ["the base lacks a weight", { "other.layer.weight": [3, 2] }],
      several: ["two weights fit a module", { "a.some.layer.weight": [3, 2], "b.some.layer.weight": [3, 2] }],
      segment: ["part of a segment does not fit", { "awesome.layer.weight": [3, 2] }],
      bare: ["a name of one segment does not fit a longer one", { weight: [3, 2] }],
      far: ["a name of 65 segments more does not fit", { [`p.${SEGMENTS}some.layer.weight`]: [3, 2] }],
      turned: ["a weight that is stored the other way round", { "some.layer.weight": [2, 3] }],
    }),
  layers: () =>
    misfits(36, [linear, { ...linear, name: "layer" }], {
      one: ["two modules fit one weight", { "some.layer.weight": [3, 2] }],
    }),
  conv: () =>
    misfits(37, [{ name: "conv", out: 2, in: 6, layout: 2, kernel: [2, 3] }], {
      kernel: ["a convolution of another kernel", { "conv.weight": [2, 1, 3, 2] }],
      channels: ["a convolution of other channels", { "conv.weight": [2, 2, 2, 3] }],
    }),
  table: () =>
    misfits(38, [{ name: "words", out: 3, in: 5, layout: 3 }], {
      turned: ["an embedding that is stored as [dimension, vocabulary]", { "words.weight": [3, 5] }],
    }),
};

/** Files of all of them by path, and `apply.json`. */
export function applyVectors() {
  const files = new Map();
  const index = [];
  for (const [name, make] of Object.entries(APPLY)) {
    const { model, bases } = make();
    files.set(`apply/${name}.eigen`, packFile(model.pack));
    for (const { name: which, base, places = {}, refused = {}, only, why } of bases) {
      const path = `apply/${which ? `${name}-${which}` : name}`;
      const tasks = model.pack.tasks.filter(({ entry: { id } }) => !(id in refused) && (only?.includes(id) ?? true));
      const values = new Map(tasks.flatMap((task) => [...applied(model, task, base, places)]));
      files.set(`${path}.base.safetensors`, safetensors(base));
      if (tasks.length > 0) files.set(`${path}.safetensors`, safetensors(values));
      index.push({
        ...{ pack: `apply/${name}.eigen`, base: `${path}.base.safetensors`, why },
        ...(tasks.length > 0 ? { values: `${path}.safetensors`, tasks: tasks.map(({ entry }) => entry.id) } : {}),
        ...(Object.keys(refused).length > 0 ? { refused } : {}),
      });
    }
  }
  const lines = index.map((entry) => `  ${JSON.stringify(entry)}`);
  files.set("apply.json", new TextEncoder().encode(`[\n${lines.join(",\n")}\n]\n`));
  return files;
}
