/** What the command check tries out where onnxruntime-node is installed. */
import { createEigenSession, createEigenSessions, type EigenSession } from "../../bindings/onnxruntime.ts";
import type { Ort } from "../../bindings/ort.ts";
import { createEngine } from "../../bindings/ort-engine.ts";
import type { Pack } from "../core/pack.ts";
import { BackendError } from "../errors.ts";
import { feedsOfRows, knownSizes, plainInputs, tableRows } from "../onnx/feeds.ts";
import { readModel } from "../onnx/read.ts";
import type { ModelInput } from "../onnx/whole.ts";
import { toTensors } from "../session/engine.ts";
import type { SessionOptions } from "../session/options.ts";

/** Something that was tried; null where it could not be. */
export interface Tried {
  readonly works: boolean | null;
  readonly says: string;
}

/** What a session on onnxruntime-node showed. */
export interface Ran {
  readonly session: Tried;
  /** What the parity probe found. */
  readonly probe: string | null;
  /** One task per row of a batch. */
  readonly rows: Tried;
  readonly learning: Tried;
}

/** The same of several files. */
export interface RanFiles extends Pick<Ran, "session" | "learning"> {
  /** What the parity probe found, by file. */
  readonly probes: Readonly<Record<string, string>>;
}

const NEVER: Tried = { works: null, says: "no session could be made" };

/** @returns undefined where onnxruntime-node is not installed */
export async function tryOut(
  model: string,
  pack: Pack,
  options: Omit<SessionOptions, "probe">,
): Promise<Ran | undefined> {
  const ort = await runtime();
  if (!ort) return undefined;
  let session: EigenSession;
  try {
    session = await createEigenSession(ort, model, pack, options);
  } catch (error) {
    const says = (error as Error).message;
    return { session: { works: false, says }, probe: null, rows: NEVER, learning: NEVER };
  }
  const probe = session.probe.result;
  const rows = await tryRows(ort, model, session).finally(() => session.close());
  return {
    session: { works: true, says: "made and run" },
    probe,
    rows,
    learning: await tryLearning(ort, model, pack, options),
  };
}

/** The files of one model. @returns undefined where onnxruntime-node is not installed */
export async function tryFiles(
  models: ReadonlyMap<string, string>,
  pack: Pack,
  options: Omit<SessionOptions, "probe">,
): Promise<RanFiles | undefined> {
  const ort = await runtime();
  if (!ort) return undefined;
  try {
    const group = await createEigenSessions(ort, Object.fromEntries(models), pack, options);
    const probes = Object.entries(group.sessions).map(([name, session]) => [name, session.probe.result] as const);
    await group.close();
    const [encoder, decoder, ...more] = models.values();
    const learning =
      decoder === undefined || more.length > 0
        ? { works: null, says: "an encoder and a decoder learn together, no other files" }
        : await tryLearning(ort, { encoder: encoder!, decoder }, pack, options);
    return { session: { works: true, says: "made and run" }, probes: Object.fromEntries(probes), learning };
  } catch (error) {
    const says = (error as Error).message;
    return { session: { works: false, says }, probes: {}, learning: NEVER };
  }
}

async function runtime(): Promise<Ort | undefined> {
  const found = await import("onnxruntime-node").catch(() => undefined);
  if (!found) return undefined;
  const ort = found as unknown as Ort;
  // It warns of initializers that nothing uses.
  (ort.env as { logLevel?: string }).logLevel = "error";
  return ort;
}

/** A batch whose rows differ, with a task in every second. */
async function tryRows(ort: Ort, model: string, session: EigenSession): Promise<Tried> {
  if (session.mode === "folded") return { works: false, says: 'mode "folded" has one task at a time' };
  const [task] = session.tasks.keys();
  const file = await readModel(model);
  try {
    const { proto, initializers } = file.model.graph;
    const own = proto.input.filter(({ name }) => !initializers.has(name));
    const made = feedsOfRows(plainInputs(own), tableRows(file.model, own), knownSizes(file.model, own));
    if (!made || task === undefined)
      return { works: null, says: made ? "the pack has no task" : "its inputs cannot be made up" };
    const feeds = toTensors(createEngine(ort), made);
    const rows = Object.values(feeds)[0]?.dims[0] ?? 0;
    const tasks = Array.from({ length: rows }, (_, row) => (row % 2 === 0 ? task : null));
    await session.run(feeds as never, { tasks });
    return { works: true, says: "a run on rows that differ keeps tasks apart" };
  } catch (error) {
    const says = (error as Error).message.trim();
    if (error instanceof BackendError && error.backend === "session") return { works: false, says };
    return { works: null, says: `the model does not run on made-up inputs (${says})` };
  } finally {
    await file.close();
  }
}

async function tryLearning(
  ort: Ort,
  model: ModelInput,
  pack: Pack,
  options: Omit<SessionOptions, "probe">,
): Promise<Tried> {
  try {
    await (await createEigenSession(ort, model, pack, { ...options, trainable: true })).close();
    return { works: true, says: "gradients pass the whole model" };
  } catch (error) {
    return { works: false, says: (error as Error).message };
  }
}
