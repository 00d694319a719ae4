/**
 * Extraction of many modules: one after another where this runs, or several at a time in threads of their own, which
 * gives the same bytes. A thread is sent one module's stack and answers with what is stored of it; or a section of a
 * pack, which it codes.
 */
import { openThread } from "#threads";
import { BackendError } from "../errors.ts";
import { encodeSection } from "../format/encode-coded.ts";
import type { TensorRef } from "../format/format.ts";
import { UnstorableError } from "../tensor/encode.ts";
import {
  type Basis,
  type BySide,
  type ExtractOptions,
  extractModule,
  type ModuleExtraction,
  type ModuleStack,
  type TaskUpdate,
} from "./components.ts";
import { pairOf, singularValues } from "./factors.ts";
import type { Products } from "./linalg.ts";
import {
  balanced,
  openSides,
  type RowFormat,
  type SideChoice,
  type SideCosts,
  sideCosts,
  spansOf,
  takeSides,
} from "./sides.ts";
import type { Thread } from "./threads-web.ts";
import { fastProducts } from "./wasm-products.ts";

/** The jobs of a module, or of a task's blob. What multiplies matrices belongs to where the work is done. */
const JOBS = {
  /** Its components and coefficients. */
  extract: (stack: ModuleStack, options: Omit<ExtractOptions, "products">, products: Products): ModuleExtraction =>
    extractModule(stack, { ...options, products }),
  spectra: ({ members, out, in: inputs }: ModuleStack, _: undefined, products: Products): number[][] =>
    members.map((member) => singularValues(pairOf(member), out, inputs, products)),
  spans: (
    stack: ModuleStack,
    { steps }: { readonly steps: readonly number[] },
    products: Products,
  ): ReturnType<typeof spansOf> => spansOf(stack, steps, products),
  sideCosts: (
    { members, ...shape }: ModuleStack,
    { bases, steps }: { readonly bases: BySide<readonly Basis[]>; readonly steps: readonly number[] },
    products: Products,
  ): SideCosts[] => {
    const opened = openSides(bases, products);
    return members.map(({ id, ...member }, i) => {
      const whole = balanced(pairOf(member), { A: undefined, B: undefined }, shape, products);
      return { id, ...sideCosts(opened, whole, shape, steps[i]!) };
    });
  },
  takeSides: (
    { members, ...shape }: ModuleStack,
    {
      bases,
      choices,
      formats,
      rank,
    }: {
      readonly bases: BySide<readonly Basis[]>;
      readonly choices: readonly BySide<SideChoice>[];
      readonly formats: readonly RowFormat[];
      readonly rank?: number | undefined;
    },
    products: Products,
  ): TaskUpdate[] => {
    const opened = openSides(bases, products);
    return members.map((member, i) => takeSides(opened, shape, member, choices[i]!, formats[i]!, products, rank));
  },
  /** Codes the blob of a task where that takes fewer bytes. The blob is transferred: the caller loses it. */
  code: (
    blob: Uint8Array,
    { tensors, before }: { readonly tensors: readonly TensorRef[]; readonly before: Uint8Array },
  ): Uint8Array => encodeSection(blob, tensors, 4, before) ?? blob,
};

type Jobs = typeof JOBS;
type Kind = keyof Jobs;
type Subject<K extends Kind = Kind> = Parameters<Jobs[K]>[0];

/** Does what `JOBS` lists. */
export interface Extractor {
  /** Modules that are worked on at a time. */
  readonly size: number;
  /** @throws whatever the work throws */
  ask<K extends Kind>(kind: K, subject: Subject<K>, options: Parameters<Jobs[K]>[1]): Promise<ReturnType<Jobs[K]>>;
  /** Gives back the memory that threads hold, until something is asked again. Only while nothing is asked. */
  rest(): Promise<void>;
  close(): Promise<void>;
}

interface Question {
  readonly kind: Kind;
  readonly subject: Subject;
  readonly options: unknown;
}

/**
 * A thread's answer. Errors do not keep their class on the way, but its name; `owner` is that of an UnstorableError.
 */
export type Answer = { readonly result: unknown } | { readonly failed: Failure };
type Failure = Pick<UnstorableError, "name" | "message" | "owner">;

/** Close it when all is done. @param threads from 2 on so many threads are started, where the platform has them */
export async function createExtractor(threads: number = 1): Promise<Extractor> {
  return threads > 1 && openThread ? inThreads(threads, openThread) : here(await fastProducts());
}

function here(products: Products): Extractor {
  return {
    size: 1,
    ask: async (kind, subject, options) => (JOBS[kind] as (...args: unknown[]) => never)(subject, options, products),
    rest: async () => {},
    close: async () => {},
  };
}

async function inThreads(count: number, open: () => Promise<Thread>): Promise<Extractor> {
  let threads: Thread[] = [];
  let idle: Thread[] = [];
  let started: Promise<void> | undefined;
  const start = async (): Promise<void> => {
    threads = await Promise.all(Array.from({ length: count }, open));
    idle = [...threads];
  };
  const waiting: ((thread: Thread) => void)[] = [];
  const close = async (): Promise<void> => {
    started = undefined;
    await Promise.all(threads.splice(0).map((thread) => thread.close()));
  };
  await (started = start());
  return {
    size: count,
    async ask(kind, subject, options) {
      await (started ??= start());
      const thread = idle.pop() ?? (await new Promise<Thread>((resolve) => waiting.push(resolve)));
      try {
        const sent = owned(subject);
        const question: Question = { kind, subject: sent, options };
        const arrays = sent instanceof Uint8Array ? [sent] : sent.members.flatMap(({ A, Bt }) => [A, Bt]);
        const buffers = arrays.map(({ buffer }) => buffer as ArrayBuffer);
        const answer = (await thread.ask(question, buffers)) as Answer;
        if ("failed" in answer) throw errorOf(answer.failed);
        return answer.result as never;
      } finally {
        const next = waiting.shift();
        if (next) next(thread);
        else idle.push(thread);
      }
    },
    rest: close,
    close,
  };
}

/** A subject that can be transferred: factors are copied, since a reader's arrays may be views of a whole file. */
function owned(subject: Subject): Subject {
  if (subject instanceof Uint8Array) return subject;
  const { name, out, in: inputs, members } = subject;
  const copies = members.map(({ id, rank, A, Bt }) => ({ id, rank, A: A.slice(), Bt: Bt.slice() }));
  return { name, out, in: inputs, members: copies };
}

/** Answers questions of `createExtractor` in a thread. Never throws. */
export async function createAnswerer(): Promise<(question: unknown) => Promise<Answer>> {
  const extractor = here(await fastProducts());
  return async (question) => {
    const { kind, subject, options } = question as Question;
    try {
      return { result: await extractor.ask(kind, subject as never, options as never) };
    } catch (error) {
      const { name, message, owner } = error as UnstorableError;
      return { failed: { name: error instanceof UnstorableError ? "UnstorableError" : name, message, owner } };
    }
  };
}

function errorOf({ name, message, owner }: Failure): Error {
  if (name === "UnstorableError") return new UnstorableError(message, undefined, owner);
  if (name === "BackendError") return new BackendError(message, { backend: "wasm" });
  return name === "RangeError" ? new RangeError(message) : new Error(message);
}
