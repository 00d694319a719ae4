/**
 * Does it pay to train the components of a pack, or to round them better? All tasks of one entropy-coded pack, distilled together on
 * train texts without labels, on components in five ways: as they are; trained with the tasks, unrounded, which no file could hold, and
 * rounded in the loop; and rounded so that errors cancel where answers depend on them. The second start has coefficients that lose
 * least of the answers instead of ΔW, by one curvature of all tasks. And with it, on components as they are, steps of integers that are
 * learned too. Bytes are those of whole files, KL(adapter ‖ pack) is that of held-back texts; no text of any test split is used but to
 * count right answers.
 */
import { buildPack } from "eigenlora/build";
import { createEigenSession } from "eigenlora/onnxruntime";
import * as ort from "onnxruntime-node";
import { mean } from "simple-statistics";
import { openPack } from "../../dist/src/core/open-pack.js";
import { encodedTensor, readTensor } from "../../dist/src/format/format.js";
import { newPack } from "../../dist/src/pack/write.js";
import { BITS } from "../../dist/src/tensor/dtypes.js";
import { decodeScales, encodeTensor, toInteger } from "../../dist/src/tensor/encode.js";
import { shuffle, uniform } from "../../dist/src/tensor/random.js";
import { copyOf } from "../../dist/src/train/state.js";
import { learnedTask } from "../../dist/src/train/stored-task.js";
import { createEncoder, model, readReference, readTask } from "../../examples/minilm.js";
import { folderOf, plainTexts, SUITES, testTexts, withAdapters } from "../lib/adapters.js";
import { choice, number, readArguments } from "../lib/arguments.js";
import { print, progress } from "../lib/report.js";
import { coefficientsOf, curvatures, rowsOf, withFeedback } from "./components/curvature.js";
import { stepMover, withOwnSteps } from "./components/steps.js";
import { accuracy, distilTogether, divergence, openStudent } from "./components/students.js";

/**
 * @typedef {import("eigenlora/build").Adapter} Adapter
 * @typedef {import("../../dist/src/train/state.js").State} State
 * @typedef {import("./components/students.js").Student} Student
 * @typedef {import("./components/students.js").TestRow} TestRow
 * @typedef {Float32Array<ArrayBuffer>} Floats
 * @typedef {{ values: Floats, steps: Floats, largest: Floats }} Components all of a pack, one behind the other
 */

const given = readArguments("Does it pay to train the components of a pack, or to round them better?", {
  suite: choice(SUITES, "which adapters", "own-seed"),
  part: choice(["fixed", "trained", "rounded", "steps"], "this part alone"),
  k: number("components of the pack", 28, 1),
  rank: number("strongest directions of each module that are kept", 5, 1),
  step: number("of the pack", 0.033),
  "feedback-step": number("of the pack whose rounding errors cancel, which takes more bytes", 0.0349),
  "head-step": number("of heads", 0.5),
  rounds: number("steps of each task", 60, 1),
  batch: number("texts of a step", 8, 1),
  rate: number("of components, in their steps", 0.06),
  "step-rate": number("of the logarithms of steps that are learned", 0.01),
  damping: number("of curvature", 0.1),
});
/** Most texts of a task, as in `bench distill`. */
const MOST_TEXTS = 512;
/** Test rows of a task. */
const MOST_TESTS = 240;
/** Batches of a task to estimate curvature. */
const BATCHES = 24;
/** Options with one thread: the same numbers on every machine. */
const SESSION = { intraOpNumThreads: 1, interOpNumThreads: 1 };
const { k, rank, rounds, batch, damping } = given;
ort.env.logLevel = "error";

await withAdapters([folderOf(given.suite)], async (adapters) => {
  const tasks = await Promise.all(adapters.map(({ id }) => readTask(id)));
  const [tests, pool] = [testTexts(tasks), plainTexts(tasks)];
  const encode = await createEncoder(ort);
  const texts = tasks.map(({ train }) => {
    const own = [...new Set(train.map(([text]) => text))].filter((text) => !tests.has(text));
    const some = shuffle(own, uniform(2)).slice(0, MOST_TEXTS);
    return [...new Set([...some, ...pool])].slice(0, Math.max(some.length, MOST_TEXTS / 2));
  });
  const reference = await readReference(given.suite);
  const testRows = tasks.map(({ test }, i) => {
    const { predictions = [] } = reference.get(adapters[i].id) ?? {};
    return test.slice(0, MOST_TESTS).map(([text, label], row) => ({ text, label, given: predictions[row] }));
  });
  const rowsOfTasks = { texts, tests: testRows, encode };
  const exact = await exactComponents(adapters);
  const rows = [];
  const asked = (/** @type {string} */ part) => given.part === undefined || given.part === part;
  if (asked("fixed") || asked("trained") || asked("steps")) {
    const opened = await open(adapters, { step: given.step, ...rowsOfTasks });
    if (asked("fixed")) rows.push(...(await fixed(opened)));
    if (asked("trained")) rows.push(...(await trained(opened)));
    if (asked("steps")) rows.push(await stepped(opened));
    await opened.session.close();
  }
  if (asked("rounded")) {
    const opened = await open(adapters, { step: given["feedback-step"], ...rowsOfTasks });
    rows.push(await rounded(opened, exact));
    await opened.session.close();
  }
  print(given.json, [
    {
      question: `Does it pay to train components, or to round them better (MiniLM, ${given.suite}, ${adapters.length} adapters, K ${k}, rank ${rank})?`,
      rows,
      notes: [
        `${rounds} steps of each task, of ${batch} texts without labels; an eighth is held back for KL(adapter ‖ pack), in nats.`,
      ],
    },
  ]);
});

/**
 * @param {readonly Adapter[]} adapters
 * @param {{ step: number, texts: readonly string[][], tests: readonly TestRow[][], encode: any }} how
 */
async function open(adapters, { step, texts, tests, encode }) {
  const options = { gauge: "balanced", rank, step, headStep: given["head-step"], select: { kind: "k", k } };
  const { chunks, report } = await buildPack(adapters, /** @type {any} */ (options));
  const pack = await openPack(new Blob(/** @type {BlobPart[]} */ (chunks)));
  const session = await createEigenSession(ort, model, /** @type {any} */ (pack), {
    trainable: true,
    session: SESSION,
  });
  const bases = (await pack.bases()).bytes;
  /** @type {Student[]} */
  const students = [];
  for (const [i, adapter] of adapters.entries())
    students.push(await openStudent(session, adapter, { texts: texts[i], test: tests[i], encode, bases }));
  progress(`${report.bytes} bytes, ${students.length} adapters asked`);
  const components = componentsOf(pack, bases, students[0]);
  const curvature = await curvatures(students, components.values, { batches: BATCHES, batch });
  return { adapters, pack, session, students, components, curvature, step };
}

/** @typedef {Awaited<ReturnType<typeof open>>} Opened */

/** Components of a pack as they are stored. @returns {Components} */
function componentsOf(
  /** @type {Opened["pack"]} */ pack,
  /** @type {Uint8Array} */ bases,
  /** @type {Student} */ { terms, start },
) {
  const values = start.parameters.slice(terms.ofTasks);
  const [steps, largest] = [new Float32Array(values.length), new Float32Array(values.length)];
  eachSide(pack, terms, ({ tensor }, at, width) => {
    const scales = decodeScales(encodedTensor(bases, tensor), tensor.rows);
    for (const [row, scale] of scales.entries()) steps.fill(scale, at + row * width, at + (row + 1) * width);
    largest.fill(2 ** (BITS[/** @type {"int8"} */ (tensor.dtype)] - 1) - 1, at, at + tensor.rows * width);
  });
  return { values, steps, largest };
}

/**
 * @param {Opened["pack"]} pack @param {Student["terms"]} terms
 * @param {(side: Opened["pack"]["modules"][number]["A"][number], at: number, width: number, name: string, which: "A" | "B") => void} visit
 */
function eachSide(pack, terms, visit) {
  for (const module of pack.modules)
    for (const which of /** @type {const} */ (["A", "B"])) {
      const parameter = terms.parameter(module.name, `components${which}`);
      if (!parameter) continue;
      const side = /** @type {any} */ (module[which][0]);
      visit(side, parameter.offset - terms.ofTasks, parameter.dims[1], module.name, which);
    }
}

/** Components (and the mean behind them) in f32, by "module side". @param {readonly Adapter[]} adapters */
async function exactComponents(adapters) {
  const options = { gauge: "balanced", rank, dtype: { basis: "f32" }, select: { kind: "k", k } };
  const pack = await openPack(
    new Blob(/** @type {any} */ ((await buildPack(adapters, /** @type {any} */ (options))).chunks)),
  );
  const bases = (await pack.bases()).bytes;
  return new Map(
    pack.modules.flatMap(({ name, A, B }) =>
      /** @type {const} */ ([
        ["A", A[0]],
        ["B", B[0]],
      ]).map(
        ([which, side]) =>
          /** @type {const} */ ([`${name} ${which}`, readTensor(bases, /** @type {any} */ (side).tensor)]),
      ),
    ),
  );
}

/** @param {Opened} opened */
async function fixed(opened) {
  const values = () => opened.components.values;
  const starts = opened.students.map(({ start }) => start);
  const near = await nearest(opened, values());
  return [
    await row("as they are", opened, starts, { values }),
    await row("as they are, coefficients by answers", opened, near, { values }),
  ];
}

/** @param {Opened} opened */
async function stepped(opened) {
  const values = () => opened.components.values;
  const own = { ...opened, students: opened.students.map(withOwnSteps) };
  const stepping = own.students.map((student) => stepMover(student, { rounds, rate: given["step-rate"] }));
  return row("as they are, steps learned, coefficients by answers", own, await nearest(own, values()), {
    values,
    stepping,
  });
}

/** @param {Opened} opened */
async function trained(opened) {
  const { values, steps, largest } = opened.components;
  const near = await nearest(opened, values);
  const rows = [];
  for (const whole of [false, true]) {
    const latent = values.map((value, i) => (steps[i] > 0 ? value / steps[i] : 0));
    const now = () => latent.map((value, i) => (whole ? toInteger(value, largest[i]) : value) * steps[i]);
    const name = `trained, ${whole ? "rounded in the loop" : "unrounded"}, coefficients by answers`;
    rows.push(await row(name, opened, near, { values: now, move: mover(latent, steps) }, whole));
  }
  return rows;
}

/** @param {Opened} opened @param {Map<string, Float32Array>} exact */
async function rounded(opened, exact) {
  const { pack, students, components, curvature } = opened;
  const values = components.values.slice();
  eachSide(pack, students[0].terms, ({ K, mean, tensor }, at, width, name, which) => {
    const all = /** @type {Float32Array} */ (exact.get(`${name} ${which}`));
    const own = new Float32Array(tensor.rows * width);
    own.set(all.subarray(0, K * width));
    if (mean) own.set(all.subarray(all.length - width), K * width);
    const of = /** @type {Float64Array} */ (curvature.get(`${name} ${which}`));
    const part = (/** @type {Floats} */ from) => from.subarray(at, at + own.length);
    values.set(withFeedback(own, part(components.steps), components.largest[at], of, 3 * damping), at);
  });
  const near = await nearest(opened, values);
  return row("rounded so that errors cancel, coefficients by answers", opened, near, { values: () => values });
}

/** States whose coefficients change the answers least. @param {Opened} opened @param {Floats} components */
async function nearest({ adapters, pack, students, curvature }, components) {
  const states = students.map(({ start }) => copyOf(start));
  for (const { name } of pack.modules) {
    const owners = adapters.filter(({ modules }) => modules.has(name));
    const wanted = await rowsOf(owners, name, rank);
    eachSide(pack, students[0].terms, ({ K }, at, width, module, which) => {
      if (module !== name) return;
      const own = components.subarray(at, at + (K + 1) * width);
      for (const [i, student] of students.entries()) {
        const place = owners.findIndex(({ id }) => id === student.id);
        const alpha = student.terms.part(states[i].parameters, name, `alpha${which}`);
        const of = /** @type {Float64Array} */ (curvature.get(`${name} ${which}`));
        if (alpha && place >= 0)
          alpha.set(coefficientsOf(wanted[place][which].subarray(0, (alpha.length / K) * width), own, K, of, damping));
      }
    });
  }
  return states;
}

/**
 * Moves components along the gradients of all tasks, divided by their root mean square, or by that of all components where theirs is
 * small.
 * @param {Floats} latent in steps, changed @param {Floats} steps
 */
function mover(latent, steps) {
  const [m, v] = [new Float32Array(latent.length), new Float32Array(latent.length)];
  return (/** @type {Floats} */ gradient, /** @type {number} */ round) => {
    const [unbias1, unbias2] = [1 - 0.9 ** round, 1 - 0.999 ** round];
    let squares = 0;
    for (let i = 0; i < m.length; i++) {
      const g = gradient[i] * steps[i];
      m[i] += 0.1 * (g - m[i]);
      v[i] += 0.001 * (g * g - v[i]);
      squares += v[i] / unbias2;
    }
    const typical = 3 * Math.sqrt(squares / m.length);
    const warm = Math.floor(rounds / 10);
    const schedule = round <= warm ? round / warm : 1 - (round - 1 - warm) / (rounds - warm);
    for (let i = 0; i < m.length; i++)
      latent[i] -= (given.rate * schedule * (m[i] / unbias1)) / (Math.sqrt(v[i] / unbias2) + typical + Number.EPSILON);
  };
}

/**
 * @param {string} name @param {Opened} opened @param {readonly State[]} starts
 * @param {{ values: () => Floats, move?: (gradient: Floats, round: number) => void, stepping?: ReturnType<typeof stepMover>[] }} components
 * @param {boolean} [storable]
 */
async function row(name, opened, starts, { values, move, stepping }, storable = true) {
  const { students } = opened;
  const states = starts.map(copyOf);
  /** @template T @param {(student: Student, state: State, values: Floats) => Promise<T>} what */
  const ask = async (what) => {
    const found = [];
    for (const [i, student] of students.entries()) found.push(await what(student, states[i], values()));
    return found;
  };
  const before = await ask(divergence);
  const answeredBefore = await ask(accuracy);
  const packed = storable ? await bytesOf(opened, states, values()) : null;
  await distilTogether(students, states, { rounds, batch, before, components: values, move, stepping });
  const after = mean(await ask(divergence));
  const answered = await ask(accuracy);
  const bytes = storable ? await bytesOf(opened, states, values()) : null;
  const made = {
    name,
    "packed, bytes": packed,
    "KL packed": mean(before),
    ...sharesOf("packed", answeredBefore),
    "distilled, bytes": bytes,
    "KL distilled": after,
    ...sharesOf("distilled", answered),
  };
  progress(JSON.stringify(made));
  return made;
}

/** @param {string} when @param {readonly { right: number, same: number }[]} answered */
function sharesOf(when, answered) {
  return {
    [`right ${when}, %`]: 100 * mean(answered.map(({ right }) => right)),
    [`as the adapter ${when}, %`]: 100 * mean(answered.map(({ same }) => same)),
  };
}

/** Bytes of the whole file. @param {Opened} opened @param {readonly State[]} states @param {Floats} values components */
async function bytesOf({ pack, students, components, step }, states, values) {
  const { terms } = students[0];
  /** @type {Map<string, { dtype: string, encoded: Uint8Array }>} */
  const encoded = new Map();
  eachSide(pack, terms, ({ tensor: { dtype, rows } }, at, width, name, which) => {
    const scales = Array.from({ length: rows }, (_, row) => components.steps[at + row * width]);
    const own = values.subarray(at, at + rows * width);
    encoded.set(`${name} ${which}`, { dtype, encoded: encodeTensor(dtype, own, rows, width, scales) });
  });
  const modules = pack.modules.map(({ A: [A], B: [B], fingerprint, ...module }) => ({
    ...module,
    A: /** @type {any} */ ({ ...A, ...encoded.get(`${module.name} A`) }),
    B: /** @type {any} */ ({ ...B, ...encoded.get(`${module.name} B`) }),
  }));
  const tasks = students.map(({ id, terms, model, stored, blob }, i) => async () => {
    const weight = blob.parameters.find(({ shape }) => shape.length > 1);
    const dtype = { coefficients: /** @type {const} */ ("int8"), head: weight?.tensor.dtype };
    const how = /** @type {any} */ ({ id, dtype, stored });
    const { adapterBytes, metadata, brings } = /** @type {any} */ (pack.tasks.get(id));
    return {
      entry: { id, adapterBytes, metadata, brings },
      blob: learnedTask(pack, terms, states[i], model.head, how).blob,
    };
  });
  const { basis } = pack.directory;
  return (await newPack({ ...basis, step, modules }, tasks)).bytes;
}
