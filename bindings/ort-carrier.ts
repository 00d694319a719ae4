/**
 * What carries tasks to a model of onnxruntime: the session, and for each selection the feeds that make it that task's model.
 * The three kinds of carriers are ort-unfolded.ts, ort-folded.ts and ort-gpu.ts; this is what they share.
 */
import { BackendError } from "../src/errors.ts";
import type { Feed } from "../src/onnx/feeds.ts";
import type { Grafted, TaskInput } from "../src/onnx/graft.ts";
import type { DetachedModel } from "../src/onnx/write.ts";
import type { Pack } from "../src/pack/pack.ts";
import type { Selection } from "../src/runtime/selection.ts";
import type { Plan } from "../src/session/plan.ts";
import type { ProbeReport, ProbeRun } from "../src/session/probe.ts";
import { stackValues, type TaskEvaluator, type TaskValues } from "../src/session/values.ts";
import {
  call,
  type Feeds,
  inTurn,
  makeTensor,
  type Ort,
  type OrtTensor,
  type Session,
  type SessionOptions,
} from "./ort.ts";

/** What runs are made of while a selection is active. */
export interface State<O extends Ort> {
  readonly session: Session<O>;
  readonly task: Selection;
  readonly feeds: Readonly<Record<string, OrtTensor>>;
  /** Of the feeds that a run carries from the CPU's memory. */
  readonly bytes: number;
}

export interface Carrier<O extends Ort> {
  readonly evaluator: TaskEvaluator;
  /** The base. */
  readonly first: State<O>;
  readonly probe: ProbeReport;
  /** What else is to be known of how tasks reach the model. */
  readonly note?: string;
  /** Of weights, at each switch. */
  readonly bytesWritten: number;
  /** When it fails, the state before stays usable. */
  make(
    selection: Selection,
    options: { signal?: AbortSignal | undefined; head?: string | undefined },
  ): Promise<State<O>>;
  /** Goes around each run. @throws BackendError where the device is lost */
  alive?<T>(run: () => Promise<T>): Promise<T>;
  /** Refuses a model that would mix the tasks of a batch. */
  checkRows?(): Promise<void>;
  /** Bytes that expand coefficients or fold, of pristine weights, and of folded ones. */
  memory(): { readonly expansion: number; readonly pristine: number; readonly folded: number };
  /** Frees all but the session. */
  dispose(): Promise<void>;
}

/** A model, prepared for the tasks of a pack. */
export interface Parts<O extends Ort> {
  readonly ort: O;
  readonly pack: Pack;
  readonly plan: Plan;
  readonly grafted: Grafted;
  readonly detached: DetachedModel;
  readonly options: {
    readonly session?: SessionOptions<O> | undefined;
    readonly probe?: boolean | Feeds<O> | undefined;
  };
  /** The model's own. */
  readonly inputs: readonly string[];
  readonly outputs: readonly string[];
  /** Made-up feeds, as far as they can be. */
  readonly feeds: Map<string, Feed> | undefined;
  /** Inputs that are the same in every run that does not learn. */
  readonly idle: Readonly<Record<string, OrtTensor>>;
}

/** @throws BackendError when onnxruntime refuses the model or the provider */
export async function createSession<O extends Ort>(
  { ort, options }: Pick<Parts<O>, "ort" | "options">,
  { bytes, files }: DetachedModel,
): Promise<Session<O>> {
  const all = { ...(options.session as object | undefined), externalData: [...files] };
  try {
    return (await inTurn(ort, () => ort.InferenceSession.create(bytes, all as never))) as Session<O>;
  } catch (cause) {
    throw new BackendError(
      `onnxruntime cannot load the model (providers: ${providersOf(options)}): ${(cause as Error).message}`,
      {
        backend: "onnxruntime",
        cause,
      },
    );
  }
}

/** As they were asked for, for people. */
export function providersOf({ session }: { session?: unknown }): string {
  return JSON.stringify((session as { executionProviders?: unknown } | undefined)?.executionProviders ?? "default");
}

/** Tensors of the task inputs, for one task or one per row. */
export function toFeeds<O extends Ort>(
  ort: O,
  inputs: readonly TaskInput[],
  rows: readonly Pick<TaskValues, "inputs">[],
): { feeds: Record<string, OrtTensor>; bytes: number } {
  const feeds: Record<string, OrtTensor> = {};
  let bytes = 0;
  for (const input of inputs) {
    const { dims, data } = stackValues(
      input,
      rows.map((row) => row.inputs.get(input.name)!),
    );
    feeds[input.name] = makeTensor(ort, data, dims);
    bytes += data.byteLength;
  }
  return { feeds, bytes };
}

/**
 * Runs a session for the probes.
 * @param given feeds of the caller's own
 */
export function probeRun<O extends Ort>(
  { ort, grafted: { inputs }, idle }: Parts<O>,
  session: Session<O>,
  given?: object,
): ProbeRun {
  return async (feeds, tasks, fetches) => {
    const tensors: Record<string, OrtTensor> = {};
    for (const [name, { data, dims }] of feeds) tensors[name] = makeTensor(ort, data, dims);
    const task = toFeeds(
      ort,
      inputs,
      tasks.map((values) => ({ inputs: values })),
    ).feeds;
    const results = (await inTurn(ort, () =>
      call(session, { ...idle, ...tensors, ...given, ...task }, fetches, {}),
    )) as Record<string, OrtTensor>;
    return Promise.all(
      fetches.map(async (name) => ((await results[name]!.getData?.()) ?? results[name]!.data) as Float32Array),
    );
  };
}
