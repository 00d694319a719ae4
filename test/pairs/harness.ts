/** Runs two calls at once and compares them with both orders one after the other. */
import { createHash } from "node:crypto";
import { setTimeout as after } from "node:timers/promises";
import type { Selection } from "eigenlora";
import type { Test } from "tap";
import { uniform } from "../internals.ts";
import { soak } from "../required.ts";

export type Call<O> = (on: O) => unknown;
/** Calls by name. A list where a signal may come in time or not: the call, and the calls whose result it may equal. */
export type Calls<O> = Readonly<Record<string, Call<O> | readonly [Call<O>, ...Call<O>[]]>>;

/** A kind of object. */
export interface Kind<O> {
  readonly name: string;
  /** Reason why the kind is missing here. */
  readonly skip?: string | undefined;
  open(): Promise<O>;
  readonly calls: Calls<O>;
  /** Observes everything after both calls. */
  look(on: O): Promise<unknown>;
  /** Pattern of an error that one call gets because the other is running, though neither order of the two would give it. */
  readonly refused?: RegExp | undefined;
  /** Factor of the usual number of interleavings. */
  readonly more?: number;
}

/** Interleavings of two calls in each order. */
const TIMES = soak ? 10 : 1;

/** Delays answers by a random number of turns of the event loop. */
let random: (() => number) | undefined;
/** Called whenever an answer comes and many times after that, to look at the state in between. */
let watch: (() => void) | undefined;
export async function late(most = 4): Promise<void> {
  for (let turns = random ? Math.floor(most * random()) : 0; turns > 0; turns--) await new Promise(setImmediate);
  if (random && watch) void watching();
}
async function watching(): Promise<void> {
  for (let i = 0; i < 100; i++) await watch?.();
}
export function watchBy(look: typeof watch): void {
  watch = look;
}

const unheard: unknown[] = [];
process.on("unhandledRejection", (error) => unheard.push(error));

/** Errors that must not occur: findings of a test, and messages that this package does not write. */
const RAW =
  /^wrong|cannot (read|destructure|set|convert)|is not (a function|iterable|defined)|nothing gives a value|undefined/i;
export function refusalOf(error: unknown): string {
  const { name, tag, message } = error as Error & { tag?: string };
  if (RAW.test(message)) return `raw: ${name}: ${message}`;
  return tag === undefined && name !== "AbortError" ? `${name}: ${message}` : (tag ?? name);
}
export function must(good: boolean, otherwise: string): void {
  if (!good) throw new Error(`wrong: ${otherwise}`);
}

type Steps = AsyncGenerator<unknown, unknown, void>;

/** Runs a call, step by step if it has steps. Begins with the first `next`. */
async function* stepsOf<O>(call: Call<O>, on: O): Steps {
  try {
    const made = call(on);
    if (!(Symbol.asyncIterator in Object(made))) return (await made) ?? null;
    for await (const step of made as AsyncIterable<unknown>) yield step;
    return "end";
  } catch (error) {
    return refusalOf(error);
  }
}

async function restOf(steps: Steps, found: unknown[] = []): Promise<unknown[]> {
  for (;;) {
    const { done, value } = await steps.next();
    found.push(value);
    if (done) return found;
  }
}
/** Result of a call, or its refusal. */
export const outcome = (call: () => unknown): Promise<unknown[]> => restOf(stepsOf(call, undefined));

/** Outcomes of two calls: one after the other, or the second between two steps of the first. */
async function orders<O>({ open, look }: Kind<O>, a: Call<O>, b: Call<O>): Promise<unknown[][]> {
  const all: unknown[][] = [];
  for (let cut = 0, through = false; !through; cut++) {
    const on = await open();
    const [steps, found]: [Steps, unknown[]] = [stepsOf(a, on), []];
    while (found.length < cut && !through) {
      const { done, value } = await steps.next();
      found.push(value);
      through = done === true;
    }
    const other = await restOf(stepsOf(b, on));
    all.push([through ? found : await restOf(steps, found), other, ...(await outcome(() => look(on)))]);
  }
  return all;
}

/** Outcomes of two named calls, as texts. */
async function allowedOf<O>(kind: Kind<O>, first: string, second: string): Promise<Set<string>> {
  const variants = (name: string): Call<O>[] => {
    const [call, ...others] = [kind.calls[name]!].flat() as [Call<O>, ...Call<O>[]];
    return others.length > 0 ? others : [call];
  };
  const allowed = new Set<string>();
  for (const a of variants(first)) {
    for (const b of variants(second)) {
      const found = await orders(kind, a, b);
      for (const one of found) allowed.add(JSON.stringify(one));
      // The second call has steps too.
      if (found.some(([, other]) => (other as unknown[]).length > 1))
        for (const [x, y, seen] of await orders(kind, b, a)) allowed.add(JSON.stringify([y, x, seen]));
    }
  }
  return allowed;
}

/** Runs both at once. @returns as `allowedOf` */
async function together<O>(
  kind: Kind<O>,
  calls: readonly [Call<O>, Call<O>],
  swapped: boolean,
  seed: number,
): Promise<string> {
  const on = await kind.open();
  random = uniform(seed);
  const [a, b] = swapped ? [calls[1], calls[0]] : calls;
  const before = restOf(stepsOf(a, on));
  if (seed % 2 === 0) await late(20);
  const both = Promise.all([before, restOf(stepsOf(b, on))]);
  const settled = await Promise.race([both, after(20_000, undefined, { ref: false })]);
  for (let turns = 0; turns < 12; turns++) await new Promise(setImmediate);
  random = undefined;
  if (!settled) return "raw: hangs";
  const [x, y] = swapped ? [settled[1], settled[0]] : settled;
  return JSON.stringify([x, y, ...(await outcome(() => kind.look(on)))]);
}

/** Tests every two calls of an object, in each order. */
export async function pairs<O>(t: Test, kind: Kind<O>): Promise<void> {
  const names = Object.keys(kind.calls);
  const started = process.cpuUsage();
  let seed = 0;
  for (const [i, first] of names.entries()) {
    for (const second of names.slice(i)) {
      const allowed = await allowedOf(kind, first, second);
      const calls = [first, second].map((name) => [kind.calls[name]!].flat()[0]) as [Call<O>, Call<O>];
      for (const swapped of first === second ? [false] : [false, true]) {
        for (let time = 0; time < TIMES * (kind.more ?? 1); time++) {
          const found = await together(kind, calls, swapped, ++seed);
          const good = (allowed.has(found) || kind.refused?.test(found)) && !found.includes("raw: ");
          if (good && unheard.length === 0) continue;
          const what = `${swapped ? second : first}, then ${swapped ? first : second}, seed ${seed}`;
          t.fail(what, { found, allowed: [...allowed], unheard: unheard.splice(0).map(String) });
        }
      }
    }
  }
  t.pass(`${names.length} calls, ${seed} times two at once`);
  t.comment(`${(process.cpuUsage(started).user / 1e6).toFixed(1)} s`);
}

export const brief = (what: string | Uint8Array): string => createHash("sha256").update(what).digest("hex").slice(0, 8);
/** Numbers as a short text. */
export const digits = (values: Uint8Array | Float32Array): string =>
  brief(values instanceof Uint8Array ? values : Array.from(values, (value) => value.toFixed(3)).join());

/** A call that is aborted, perhaps too late. */
export function aborted<O>(call: (on: O, signal: AbortSignal) => unknown): [Call<O>, ...Call<O>[]] {
  const broken = (on: O): unknown => {
    const end = new AbortController();
    void late(20).then(() => end.abort());
    return call(on, end.signal);
  };
  return [broken, (on) => call(on, AbortSignal.abort()), (on) => call(on, new AbortController().signal)];
}

type Switch = (selection: Selection) => Promise<{ task: Selection }>;
export const to = (switchTask: Switch, selection: Selection): Promise<Selection> =>
  switchTask(selection).then(({ task }) => task);

/** Switches to a blend that is changed right after it was passed. */
export async function changing(switchTask: Switch): Promise<Selection> {
  const blend = { a: 0.5, b: 0.25 };
  const switched = to(switchTask, blend);
  blend.a = 7;
  const task = (await switched) as typeof blend;
  must(task.a === 0.5, `the blend is what came later, ${task.a}`);
  return task;
}

/** Closes an object that refuses everything afterwards. */
export async function closed(closing: Promise<void>, others: readonly (() => unknown)[]): Promise<void> {
  await closing;
  for (const other of others) {
    const [result] = await outcome(other);
    must(result === "backend" || result === "source", `after close: ${JSON.stringify(result)}`);
  }
}

export const some = <O>(calls: Calls<O>, ...names: readonly string[]): Calls<O> =>
  Object.fromEntries(names.map((name) => [name, calls[name]!]));
export const without = <O>(calls: Calls<O>, ...names: readonly string[]): Calls<O> =>
  Object.fromEntries(Object.entries(calls).filter(([name]) => !names.includes(name)));
