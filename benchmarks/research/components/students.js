/** Tasks of one pack that are distilled together: each has its coefficients and head, the components are common to all. */

import { shuffle, uniform } from "../../../dist/src/tensor/random.js";
import { answersOf } from "../../../dist/src/train/answers.js";
import { supervisionOf } from "../../../dist/src/train/create-trainer.js";
import { toBatches } from "../../../dist/src/train/examples.js";
import { mapLayers } from "../../../dist/src/train/head.js";
import { answers } from "../../../dist/src/train/objective.js";
import { largest, MeanDivergence, sureTemperature, tempered } from "../../../dist/src/train/probabilities.js";
import { readDonor, startState } from "../../../dist/src/train/start.js";
import { optimizerOf, stateLike } from "../../../dist/src/train/state.js";
import { stepsOf, toSteps } from "../../../dist/src/train/stored-task.js";
import { headInputs, sessionModel } from "../../../dist/src/train/trainable-model.js";
import { sharedRows, TrainedTerms } from "../../../dist/src/train/trained-terms.js";

/**
 * @typedef {import("eigenlora/build").Adapter} Adapter
 * @typedef {import("../../../dist/src/train/head.js").LayerNumbers} LayerNumbers
 * @typedef {import("../../../dist/src/train/state.js").State} State
 * @typedef {Float32Array<ArrayBuffer>} Floats
 * @typedef {Awaited<ReturnType<typeof openStudent>>} Student
 * @typedef {import("../../../dist/src/train/examples.js").Row<any>} Row
 * @typedef {{ text: string, label: number, given: number | undefined }} TestRow given: the adapter's own answer
 */

/** `distill`'s own rate: the total length of all steps of one coefficient for each root of a nat, over its 240 steps. */
const [WAY, OF_STEPS, MOST_RATE] = [7, 240, 0.02];
const HOLDOUT = 0.125;

/**
 * @param {any} session a trainable session of onnxruntime
 * @param {Adapter} adapter whose answers count
 * @param {{ texts: readonly string[], test: readonly TestRow[], encode: any, bases: Uint8Array }} with
 */
export async function openStudent(session, adapter, { texts, test, encode, bases }) {
  const pack = /** @type {import("../../../dist/src/core/pack.js").Pack} */ (session.pack);
  const { trainable } = session;
  const { id } = adapter;
  const blob = await pack.load(id);
  const weights = blob.parameters.filter(({ role, shape }) => role === "saved" && shape.length === 2);
  const head = weights.map(({ name }) => name.slice(0, -".weight".length));
  const asking = supervisionOf(session, { encode });
  const rows = await asking.ask(
    shuffle(
      texts.map((text) => ({ text })),
      uniform(0),
    ),
    "components",
  );
  const found = await answersOf(session, adapter, head, rows, { where: "components", supervision: asking });
  const asked = await asking.ask(
    test.map(({ text }) => ({ text })),
    "components",
  );
  const tests = new Map(asked.map((row, i) => [row, test[i]]));
  const of = (/** @type {Row} */ row) => /** @type {any} */ (found.get(row))?.distributions;
  const labels = Array.from(of(rows[0])[0].probabilities, (_, i) => String(i));
  const supervision = supervisionOf(session, { encode, labels });
  const taught = rows.map((row) => supervision.answered(row, of(row)));
  const held = Math.round(HOLDOUT * taught.length);
  const terms = new TrainedTerms(
    pack.modules.flatMap((module, index) => {
      const term = blob.terms.find((one) => one.module === index);
      if (!term) return [];
      const shared = sharedRows(module, bases, term.rank, true, term);
      return [{ name: module.name, in: module.in, out: module.out, shared, privateRank: 0 }];
    }),
  );
  const model = await sessionModel(trainable, terms, headInputs(trainable, head), labels);
  const setup = { pack, model, supervision, terms, origin: terms, labels };
  const start = await startState(setup, await readDonor(pack, id), uniform(0));
  const temperature = sureTemperature(taught.map(({ target }) => Float32Array.from(/** @type {any} */ (target))));
  const train = taught.slice(held);
  const trainRows = train.map((row) => ({ ...row, target: tempered(/** @type {any} */ (row.target), temperature) }));
  const stored = /** @type {NonNullable<ReturnType<typeof stepsOf>>} */ (stepsOf(pack, terms, blob, model.head));
  const lengths = await supervision.lengths(trainRows);
  return {
    ...{ id, blob, labels, supervision, terms, model, setup, start, stored, temperature, lengths },
    ...{ judges: taught.slice(0, held), train, trainRows, tests },
  };
}

/**
 * Numbers that the model is fed with: coefficients and head as they will be stored, and these components.
 * @param {Student} student @param {State} state @param {Floats} components
 */
export function numbersOf({ model, stored, terms }, state, components) {
  const head = mapLayers(model.head, state, (_, { weight }, i) => {
    const steps = stored.head[i];
    return steps ? { weight: toSteps(weight, steps.weight, steps.largest) } : {};
  });
  const parameters = toSteps(state.parameters, stored.parameters);
  parameters.set(components, terms.ofTasks);
  return { ...head, parameters };
}

/** @param {Student} student @param {LayerNumbers & { parameters: Floats }} numbers @param {number} [temperature] */
export const weightsOf = (student, numbers, temperature = 1) => ({
  terms: student.terms.expand(numbers.parameters),
  ...divided(student, numbers, temperature),
});

/** @param {Student} student @param {LayerNumbers} numbers @param {number} temperature */
function divided({ model }, numbers, temperature) {
  const by = (/** @type {Floats} */ part) => part.map((value) => value / temperature);
  return mapLayers(model.head, numbers, ({ last }, { weight, bias }) =>
    last ? { weight: by(weight), bias: by(bias) } : {},
  );
}

/** Mean KL(adapter ‖ task) on the hold-out. @param {Student} student @param {State} state @param {Floats} components */
export async function divergence(student, state, components) {
  const found = new MeanDivergence();
  const weights = weightsOf(student, numbersOf(student, state, components));
  for await (const { row, logits } of answers(student.setup, student.judges, weights))
    found.add(student.supervision.wanted(row), logits);
  return found.mean;
}

/**
 * Shares of the test rows that are answered right, and as the adapter answers them.
 * @param {Student} student @param {State} state @param {Floats} components
 */
export async function accuracy(student, state, components) {
  const weights = weightsOf(student, numbersOf(student, state, components));
  let [right, same] = [0, 0];
  for await (const { row, logits } of answers(student.setup, [...student.tests.keys()], weights)) {
    const { label, given } = /** @type {TestRow} */ (student.tests.get(row));
    const found = largest(logits[0]);
    right += Number(found === label);
    same += Number(found === given);
  }
  return { right: right / student.tests.size, same: same / student.tests.size };
}

/**
 * Gradients of a batch.
 * @param {Student} student @param {readonly Row[]} rows @param {State} state @param {Floats} components
 * @returns {Promise<State>}
 */
async function gradientsOf(student, rows, state, components) {
  const { supervision, model, terms, temperature } = student;
  const numbers = numbersOf(student, state, components);
  const weights = weightsOf(student, numbers, temperature);
  const sum = stateLike(state);
  const add = (/** @type {Floats} */ to, /** @type {Floats} */ from, /** @type {number} */ share) => {
    for (let i = 0; i < to.length; i++) to[i] += share * from[i];
  };
  for (const { rows: some, targets, share } of supervision.microBatches(rows, 0)) {
    const { gradients } = await model.step(await supervision.feeds(some), weights, targets);
    const head = divided(student, gradients, temperature);
    add(sum.parameters, terms.pullBack(numbers.parameters, gradients.terms), share);
    add(sum.weight, head.weight, share);
    add(sum.bias, head.bias, share);
  }
  return sum;
}

/**
 * Distils all tasks, a step of each in turn; the components move once after a step of all tasks, the steps of integers with each.
 * @param {readonly Student[]} students
 * @param {readonly State[]} states changed
 * @param {{ rounds: number, batch: number, before: readonly number[], components: () => Floats, move?: (gradient: Floats, round: number)
 * => void,
 *   stepping?: readonly ((gradients: State, state: State, round: number) => void)[] }} how stepping: of each student
 */
export async function distilTogether(students, states, { rounds, batch, before, components, move, stepping }) {
  const each = students.map((student, i) => {
    const { terms, model } = student;
    const rate = Math.min(MOST_RATE, (WAY * Math.sqrt(before[i])) / OF_STEPS);
    const learningRates = { terms: rate, head: rate, components: 0 };
    const optimizer = optimizerOf(states[i], terms, model.head, rounds, { learningRates });
    return { student, state: states[i], optimizer, random: uniform(0), queue: /** @type {Row[][]} */ ([]) };
  });
  for (let round = 1; round <= rounds; round++) {
    const sum = new Float32Array(components().length);
    for (const [i, one] of each.entries()) {
      const { student, state, optimizer, random } = one;
      if (one.queue.length === 0) one.queue = toBatches(student.trainRows, batch, student.lengths, random);
      const rows = /** @type {Row[]} */ (one.queue.shift());
      const gradients = await gradientsOf(student, rows, state, components());
      stepping?.[i](gradients, state, round);
      const { ofTasks } = student.terms;
      // Sharper answers have larger gradients.
      for (let i = 0; i < sum.length; i++) sum[i] += student.temperature * gradients.parameters[ofTasks + i];
      gradients.parameters.fill(0, ofTasks);
      optimizer.step(gradients);
    }
    move?.(sum, round);
  }
}
