/**
 * Shared by the tests of sessions: the runtimes, the tiny models of test/data/sessions, packs for them, their answers.
 */
import { readdirSync, readFileSync } from "node:fs";

import { type OpenOptions, openPack, type Pack, type SourceInput } from "eigenlora";
import type { BuildOptions } from "eigenlora/build";
import { createEigenSession, type EigenSession, type EigenSessionOptions } from "eigenlora/onnxruntime";

import { createSession, type Engine, type SessionOptions } from "eigenlora/session";
import type * as common from "onnxruntime-common";
import * as node from "onnxruntime-node";
import * as web from "onnxruntime-web";
import type { Test } from "tap";
import { difference } from "./compare.ts";
import { openSafetensors, openSource } from "./internals/base.ts";
import { data, LOSSLESS, packOf } from "./packs.ts";
import { PlainEngine, PlainTensor } from "./plain-engine.ts";
import { soak, whole } from "./required.ts";

export { difference };
export type Ort = typeof common;
export type Session = EigenSession<Ort>;
export type Options = EigenSessionOptions<Ort>;
export type Feeds = Record<string, common.Tensor>;
export type Mode = "core" | "factors" | "folded";

web.env.wasm.numThreads = 1;
web.env.logLevel = "error";
// Warnings about unused initializers are expected.
node.env.logLevel = "error";
// Two files are tested at a time, whose threads would spin while they wait for a core. The soak takes as many as the
// runtime does.
const { create } = node.InferenceSession;
if (!soak)
  node.InferenceSession.create = ((bytes: Uint8Array, options?: common.InferenceSession.SessionOptions) =>
    create.call(node.InferenceSession, bytes, { intraOpNumThreads: 1, ...options })) as typeof create;

export const ORTS: readonly { name: string; ort: Ort }[] = [
  { name: "onnxruntime-node", ort: node },
  ...(whole ? [{ name: "onnxruntime-web", ort: web }] : []),
];
/** Runtimes of session tests: modules of onnxruntime, or an engine with its tensors. */
export type Runtime = Ort | { readonly Tensor: Ort["Tensor"]; readonly engine: Engine };

export const RUNTIMES: readonly { name: string; ort: Runtime }[] = [
  ...ORTS,
  { name: "a plain engine", ort: { Tensor: PlainTensor as unknown as Ort["Tensor"], engine: new PlainEngine() } },
];
export const NODE: Ort = node;
export const WEB: Ort = web;
export const MODES: readonly Mode[] = ["core", "factors", "folded"];
/**
 * Modes of tests on each runtime. A graph is the same on all; the gate takes one mode on those that are slow to open a
 * model.
 */
export const modesOn = (runtime: string): readonly Mode[] =>
  soak || runtime !== "onnxruntime-web" ? MODES : MODES.slice(0, 1);

interface Goldens {
  feeds: Record<string, number[][]> & { deep: boolean[] };
  /** Key of `outputs` by model. */
  models: Record<string, string>;
  outputs: Record<string, Record<string, Nested>>;
}
type Nested = number | readonly Nested[];

export const GOLDENS = JSON.parse(readFileSync(data("sessions/goldens.json"), "utf8")) as Goldens;

/** Path of one of the tiny models. */
export function model(name: string): string {
  return data(`sessions/${name}.onnx`);
}

/** Bytes of one of the tiny models. */
export function modelBytes(name: string): Uint8Array<ArrayBuffer> {
  return new Uint8Array(readFileSync(model(name)));
}

/** Answer of a task, "base" for none: row-major values. */
export function golden(answers: string, task: string | null): readonly number[] {
  return [GOLDENS.outputs[answers]![task ?? "base"]!].flat(Infinity as 1) as number[];
}

/** One row of a task's answer. */
export function goldenRow(answers: string, task: string | null, row: number): readonly number[] {
  return [(GOLDENS.outputs[answers]![task ?? "base"] as readonly Nested[])[row]!].flat(Infinity as 1) as number[];
}

/** Bytes of a pack of adapters under test/data/sessions, with the fingerprints of `base` there. */
export async function packBytes(
  adapters: readonly string[],
  base?: string,
  options: BuildOptions = LOSSLESS,
): Promise<Uint8Array<ArrayBuffer>> {
  const paths = adapters.map((path) => `sessions/${path}`);
  const host = base === undefined ? {} : { base: data(`sessions/${base}.safetensors`) };
  return (await packOf(paths, { ...options, ...host })).bytes;
}

/** The pack of each of the tiny models, by the key of its answers. */
const PACKS: Record<string, readonly [adapters: readonly string[], base: string]> = {
  base: [["adapters"], "base"],
  f16: [["adapters"], "base"],
  q4: [["adapters"], "base"],
  int8: [["adapters"], "base"],
  qdq: [["adapters"], "base"],
  tied: [["adapters/two", "adapters/three"], "base-tied"],
  encoder: [["adapters/two"], "base"],
  mlp: [["adapters-mlp"], "base-mlp"],
  twice: [["adapters-mlp"], "base-mlp"],
};
const made = new Map<string, Promise<Uint8Array<ArrayBuffer>>>();

/** Makes a pack of all adapters that a model has answers for. */
export async function packFor(answers: string, options?: OpenOptions): Promise<Pack> {
  let bytes = made.get(answers);
  if (!bytes) made.set(answers, (bytes = packBytes(...PACKS[answers]!)));
  return openPack(await bytes, options);
}

/** The golden feeds that a session takes; only some rows where asked. */
export function feeds(
  ort: Pick<Ort, "Tensor">,
  session: { inputNames: readonly string[] },
  rows: readonly number[] = [0, 1, 2],
): Feeds {
  const made: Feeds = {};
  for (const name of session.inputNames) {
    if (name === "deep") {
      made[name] = new ort.Tensor("bool", Uint8Array.from(GOLDENS.feeds.deep, Number), [1]);
      continue;
    }
    const values = rows.map((row) => GOLDENS.feeds[name]![row]!);
    const dims = [values.length, values[0]!.length];
    const flat = values.flat();
    made[name] =
      name === "x"
        ? new ort.Tensor("float32", Float32Array.from(flat), dims)
        : new ort.Tensor("int64", BigInt64Array.from(flat, BigInt), dims);
  }
  return made;
}

/** The golden feeds as JSON for a page. */
export const JSON_FEEDS: Readonly<Record<string, { type: string; dims: number[]; data: number[] }>> =
  Object.fromEntries(
    Object.entries(GOLDENS.feeds as Record<string, number[][]>)
      .filter(([name]) => name !== "deep")
      .map(([name, rows]) => [
        name,
        { type: name === "x" ? "float32" : "int64", dims: [rows.length, rows[0]!.length], data: rows.flat() },
      ]),
  );

/** Rows of integers. */
export function int64({ Tensor }: Pick<Ort, "Tensor">, rows: readonly (readonly number[])[]): common.Tensor {
  return new Tensor("int64", BigInt64Array.from(rows.flat(), BigInt), [rows.length, rows[0]!.length]);
}

/** Tensors of a safetensors file, as feeds. */
export async function feedsIn(path: string): Promise<Feeds> {
  const source = await openSource(path);
  const file = await openSafetensors(source);
  const feeds: Feeds = {};
  for (const [name, { dtype, shape }] of file.tensors) {
    const { buffer } = Uint8Array.from(await file.read(name));
    if (dtype === "I64") feeds[name] = new node.Tensor("int64", new BigInt64Array(buffer), shape);
    else feeds[name] = new node.Tensor("float32", new Float32Array(buffer), shape);
  }
  await source.close?.();
  return feeds;
}

/** The runtime with a provider that takes some inputs and ignores them: its nodes get zeros. */
export function ignoring(ort: Ort, which: (name: string) => boolean): Ort {
  const create = async (...given: Parameters<Ort["InferenceSession"]["create"]>) =>
    new Proxy(await ort.InferenceSession.create(...given), {
      get(target, key) {
        const value = Reflect.get(target, key, target);
        if (key !== "run") return typeof value === "function" ? value.bind(target) : value;
        return (run: Feeds, ...rest: never[]) => {
          const zeros = ({ size, dims }: common.Tensor) => new ort.Tensor("float32", new Float32Array(size), dims);
          const fed = Object.entries(run).map(([name, tensor]) => [name, which(name) ? zeros(tensor) : tensor]);
          return target.run(Object.fromEntries(fed), ...rest);
        };
      },
    });
  return { ...ort, InferenceSession: { create } } as unknown as Ort;
}

export function open(ort: Runtime, input: SourceInput, pack: Pack, options: Options = {}): Promise<Session> {
  if (!("engine" in ort)) return createEigenSession(ort, input, pack, options);
  return createSession(ort.engine, input, pack, options as SessionOptions);
}

/** The first output of a run as numbers. */
export async function outputOf(
  session: Session,
  run: Feeds,
  options?: { tasks: readonly (string | null)[] },
): Promise<Float32Array> {
  const results = await session.run(run, options);
  return results[session.outputNames[0]!]!.data as Float32Array;
}

/** Allowed difference of answers, and where they are from. */
interface Holds {
  /** Default: 1e-5. */
  readonly allowed?: number | ((task: string | null) => number);
  readonly what: string;
}

/** Checks the answers of the base, of each task, and of the base again. */
export async function checkTasks(
  t: Pick<Test, "ok">,
  session: Session,
  run: Feeds,
  tasks: Iterable<string>,
  answer: (task: string | null) => readonly number[],
  { allowed = 1e-5, what }: Holds,
): Promise<void> {
  for (const task of [null, ...tasks, null]) {
    await session.switchTask(task);
    const off = difference(await outputOf(session, run), answer(task));
    t.ok(off <= (typeof allowed === "number" ? allowed : allowed(task)), `${what}, ${task}: off by ${off}`);
  }
}

/** Checks one task in each row. @param answer one row of a task's answer, which may have fewer columns than others */
export async function checkRows(
  t: Pick<Test, "ok">,
  session: Session,
  run: Feeds,
  tasks: readonly (string | null)[],
  answer: (task: string | null, row: number) => readonly number[],
  { allowed = 1e-5, what }: Holds,
): Promise<void> {
  const values = await outputOf(session, run, { tasks });
  const width = values.length / tasks.length;
  for (const [row, task] of tasks.entries()) {
    const expected = answer(task, row);
    const off = difference(values.subarray(row * width, row * width + expected.length), expected);
    t.ok(
      off <= (typeof allowed === "number" ? allowed : allowed(task)),
      `${what}, ${task} in row ${row}: off by ${off}`,
    );
  }
}

/** Error of an action that must be refused. */
export async function refusal(action: () => Promise<unknown>): Promise<Error & { tag?: string; module?: string }> {
  try {
    await action();
  } catch (error) {
    return error as Error;
  }
  throw new Error("not refused");
}

/** Names of the folders in a folder under test/data/sessions. */
export function folders(path: string): string[] {
  return readdirSync(data(`sessions/${path}`)).sort();
}
