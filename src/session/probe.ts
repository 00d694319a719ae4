/**
 * The parity probe: a tiny run of a made-up task right after a model is loaded. The term of the first adapted layer is compared with
 * plain arithmetic on what enters that layer; where it is out of reach, the outputs with the base's. Some providers ignore our inputs
 * without a word; better to know before the first answer.
 */
import { BackendError } from "../errors.ts";
import type { ProbeOutputs, TaskInput } from "../onnx/adapted.ts";
import type { CarrierParts } from "./carrier.ts";
import type { InputValue } from "./components.ts";
import { dataOf, type Engine, type LoadedModel, type Tensors, toTensors } from "./engine.ts";
import { madeUpCores, type ProbeReport, type ProbeValue, termOf, waves } from "./probe-term.ts";
import { type InputValues, toFeeds } from "./values.ts";

/** Runs the model on one task, or on one per row, and on more feeds; gives the values of `fetches`, f32. */
type ProbeRun = (
  tasks: readonly InputValues[],
  fetches: readonly string[],
  more?: Tensors,
) => Promise<readonly ProbeValue[]>;

/** How far a provider may be off that computes in f16, or rounds inputs to 8 bits: where these are uneven, by some hundredths. */
const TOLERANCE = 0.1;

/**
 * Runs a probe on feeds of the caller's own or made-up ones.
 * @param look compares results of the model
 */
export async function withFeeds(
  { engine, prepared, probe, idle }: CarrierParts,
  model: LoadedModel,
  look: (run: ProbeRun) => Promise<ProbeReport>,
): Promise<ProbeReport> {
  if (probe === false) return { result: "skipped: asked not to" };
  const made = typeof probe === "object" ? probe : prepared.feeds && toTensors(engine, prepared.feeds);
  if (!made) {
    return { result: "skipped: the model's inputs are of kinds that cannot be made up; pass `probe: feeds`" };
  }
  let failure: unknown;
  const run: ProbeRun = async (tasks, fetches, more) => {
    const { feeds } = toFeeds(engine, prepared.inputs, tasks);
    try {
      const results = await engine.run(model, { ...idle, ...made, ...more, ...feeds }, fetches);
      const valueOf = async (name: string): Promise<ProbeValue> => {
        return { dims: results[name]!.dims, data: (await dataOf(results[name]!)) as Float32Array };
      };
      return await Promise.all(fetches.map(valueOf));
    } catch (cause) {
      failure = cause;
      throw cause;
    }
  };
  try {
    return await look(run);
  } catch (cause) {
    if (cause !== failure) throw cause;
    const why = (cause as Error).message.trim();
    return { result: `skipped: the model does not run on the inputs of the probe (${why}); pass \`probe: feeds\`` };
  }
}

/**
 * @param base values of the task inputs without a task
 * @throws BackendError when the provider ignores the inputs or computes something else
 */
export async function probeParity(parts: CarrierParts, model: LoadedModel, base: InputValues): Promise<ProbeReport> {
  const { engine, prepared } = parts;
  const { modules, inputs, probe, formProbes, outputNames } = prepared;
  const probes = [...(probe ? [probe] : []), ...formProbes];
  if (parts.probe !== false && probes.length === 0 && modules.length === 0) {
    return { result: "skipped: no layer is adapted in the graph" };
  }
  return withFeeds(parts, model, async (run) => {
    const task = madeUp(base, inputs, formProbes);
    if (probes.length > 0) {
      const found = await run(
        [task],
        probes.flatMap(({ x, term }) => [x, term]),
      );
      const linear =
        probe && compared(probe.module, termOfLayer(probe, prepared, task, found[0]!.data), found[1]!.data, engine);
      if (formProbes.length === 0) return linear!;
      const { expectedTerms } = await import("./probe-forms.ts");
      const terms = expectedTerms(formProbes, prepared, task, found.slice(-2 * formProbes.length));
      const all = terms.map(({ module, expected, term }) => compared(module, expected, term, engine));
      // A term that could not be compared counts as the worst.
      return worst(linear ? [linear, ...all] : all);
    }
    const [output] = outputNames as [string];
    const [[after], [before]] = [await run([task], [output]), await run([base], [output])];
    if (isSame(before!.data, after!.data)) throw wrong(engine, `gives the same "${output}" with and without a task`);
    return { result: "passed" };
  });
}

function termOfLayer(
  probe: ProbeOutputs,
  { modules, inputs }: CarrierParts["prepared"],
  task: InputValues,
  x: Float32Array,
) {
  return termOf(modules.find(({ name }) => name === probe.module)!, x, inputs, task);
}

function compared(module: string, expected: Float64Array, term: ArrayLike<number>, engine: Engine): ProbeReport {
  const largest = expected.reduce((m, v) => Math.max(m, Math.abs(v)), 0);
  if (!(largest > 0)) {
    return { result: `skipped: nothing enters "${module}" on made-up inputs; pass \`probe: feeds\`` };
  }
  const difference = expected.reduce((m, v, i) => Math.max(m, Math.abs(v - term[i]!)), 0) / largest;
  // Not ≤: NaN must fail.
  if (difference < TOLERANCE) return { result: "passed", module, difference };
  const off = `is off by ${difference.toPrecision(2)} of the largest value in the term of "${module}"`;
  throw wrong(engine, `${off} (it may ignore inputs)`);
}

function worst(reports: readonly ProbeReport[]): ProbeReport {
  const rank = ({ difference = Infinity }: ProbeReport): number => difference;
  return reports.reduce((most, one) => (rank(one) > rank(most) ? one : most));
}

function wrong({ provider }: Engine, what: string): BackendError {
  const message = `the provider ${provider} ${what}: results would be silently wrong. Use another provider`;
  return new BackendError(message, { backend: provider });
}

/** Small values that differ everywhere, where the base has zeros. */
function madeUp(
  base: InputValues,
  inputs: readonly TaskInput[],
  also: readonly { readonly module: string }[],
): Map<string, InputValue> {
  const values = new Map(base);
  for (const input of inputs) {
    const { name, of, kind } = input;
    if (kind === "core") values.set(name, madeUpCores(input));
    const isAsked = kind === "bias" && also.some(({ module }) => module === of);
    if (!isAsked && kind !== "A" && kind !== "B") continue;
    const { dims, data } = base.get(name)!;
    values.set(name, { dims, data: waves(data.length) });
  }
  return values;
}

function isSame(a: Float32Array, b: Float32Array): boolean {
  return a.length === b.length && a.every((v, i) => v === b[i]);
}
