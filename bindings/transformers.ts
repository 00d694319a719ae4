/**
 * `eigenlora/transformers`: a pack on a pipeline of transformers.js 4. The pipeline's session is replaced by one that
 * switches tasks; the pipeline stays what it is, and so do its tokenizer, generation and post-processing. Nothing of
 * transformers.js or onnxruntime is imported here: both are reached through the pipeline.
 */
import { checkChoice, checkOptions, checkPack } from "../src/arguments.ts";
import type { Pack, TaskInfo } from "../src/pack/pack.ts";
import { copySelection, type Selection } from "../src/runtime/selection.ts";
import { hold } from "../src/session/hold.ts";
import { type Labels, labelsOf } from "../src/session/labels.ts";
import { SESSION_OPTIONS } from "../src/session/options.ts";
import { Turns } from "../src/session/turns.ts";
import type { SourceInput } from "../src/source.ts";
import {
  createEigenSession,
  type EigenSession,
  type EigenSessionOptions,
  type MemoryReport,
  type OrtSession,
  type SessionSwitchReport,
  type SwitchOptions,
} from "./onnxruntime.ts";
import {
  externalFiles,
  type Found,
  finder,
  handedOver,
  isId,
  type PipelineModel,
  type PipelineOrt,
  type PipelineSession,
  remake,
} from "./transformers-model.ts";

export type { PipelineModel, PipelineOrt, PipelineSession };

/** What `pipeline()` of transformers.js gives, as far as it is needed here. */
export interface TransformersPipeline {
  readonly model: PipelineModel;
  readonly tokenizer?: unknown;
}

/** Options of `attachPack`. */
export interface AttachOptions extends EigenSessionOptions<PipelineOrt> {
  /**
   * The pipeline's model: its id as given to `pipeline()`, or path, URL, Blob or bytes of its ONNX file. A string that
   * ends in ".onnx" or begins with "https:" or the like is a file, any other an id.
   */
  model: SourceInput;
  /** Which of the model's sessions runs the adapted layers. Needed where there are several. */
  part?: string | undefined;
  /**
   * What becomes of the pipeline's own session. Default: "release", it goes once ours is made, so that for a moment
   * both are in memory. "release-first": it goes before ours is made; when making ours fails, the pipeline is of no use
   * any more. "keep": it stays in memory for `close`.
   */
  original?: "release" | "release-first" | "keep" | undefined;
  /**
   * Options that were given to `pipeline()` and say where an id's files are or how to run them: `revision`,
   * `subfolder`, `model_file_name`, `cache_dir`, `session_options`, … `device` and `dtype` are known, but for a `dtype`
   * by part.
   */
  pretrained?: Readonly<Record<string, unknown>> | undefined;
  /** The class `Tensor` of the pipeline's onnxruntime, where no tokenizer makes any. */
  Tensor?: PipelineOrt["Tensor"] | undefined;
}

const OPTIONS = [...SESSION_OPTIONS, "session", "model", "part", "original", "pretrained", "Tensor"] as const;

/** Models that have a pack. */
const attached = new WeakSet<object>();

/**
 * Puts a pack on a pipeline: `pipe` answers as before, until `switchTask`. Call it while no call of `pipe` is running;
 * calls made meanwhile wait. In browsers, no other pipeline must run meanwhile either: onnxruntime-web cannot overlap
 * runs, and the parity probe is one (`probe: false` leaves it out).
 *
 * The model is loaded again, with the components inside. By id, transformers.js finds the file as it did before: a path
 * in Node, its cache in browsers. This costs the time to load the model once more and, unless `original` is
 * "release-first", the memory of both sessions until the pipeline's own is released.
 *
 * The pack stays the caller's: close it after `close` or `pipe.dispose()`.
 *
 * @throws TypeError when `pipe` is no pipeline, has a pack already or has several sessions and no `part` is given, or
 *   when `model` is another model
 * @throws SourceError when the model's files are not found again: the message says what to pass
 * @throws as `createEigenSession`: BaseMismatchError for another base, BackendError when onnxruntime refuses the model
 * @example
 * const pipe = await pipeline("text-classification", "minilm", { dtype: "fp16" });
 * const pack = await openPack("tasks.eigen");
 * const tasks = await attachPack(pipe, pack, { model: "minilm" });
 * await tasks.switchTask("debtags-role");
 * console.log(await pipe("a graphical editor for images"));
 * await pipe.dispose();
 * await pack.close();
 */
export async function attachPack(
  pipe: TransformersPipeline,
  pack: Pack,
  options: AttachOptions,
): Promise<AttachedPack> {
  checkPack("attachPack", pack);
  // Before anything of the pipeline is given up.
  checkOptions("attachPack", options ?? {}, OPTIONS);
  const { model, part, original = "release", pretrained = {}, Tensor, ...rest } = options ?? {};
  if (model === undefined) {
    const what = "pass { model }, the id as given to pipeline(), or the ONNX file";
    throw new TypeError(`attachPack: a pipeline does not keep its model; ${what}`);
  }
  checkChoice("original", original, ["release", "release-first", "keep"]);
  const name = partOf(pipe, part);
  const own = pipe.model.sessions[name] as PipelineSession;
  const InferenceSession = own.constructor as never;
  const ort: PipelineOrt = { InferenceSession, Tensor: Tensor ?? tensorClass(pipe), env: ENV };
  const held = holdCalls(pipe);
  try {
    return await held.turns.change(async () => {
      const find = isId(model) ? finder(pipe.model, name, own, model, pretrained) : undefined;
      const shown = shownOf(own);
      const found = (await find?.()) ?? handedOver(model, own.config?.device);
      if (original === "release-first") await own.release();
      const session = await createEigenSession(ort, found.model, pack, {
        ...(found.externalData && { external: externalFiles(found.externalData) }),
        ...rest,
        session: { ...found.session, ...rest.session },
      });
      const kept = original === "keep" ? own : undefined;
      try {
        refuseOther(session, shown);
        if (original === "release") await own.release();
      } catch (error) {
        await session.close();
        throw error;
      }
      pipe.model.sessions[name] = standIn(shown, session, kept);
      return new AttachedPack({ pipe, name, session, held, own, kept, find, ignore: rest.ignore });
    });
  } catch (error) {
    held.free();
    throw error;
  }
}

// What stays as long as the pack is attached is made by functions of their own: a closure keeps whatever the function
// around it has given to any closure, and that must not be the model's bytes.

/** The calls of a pipeline, in turns with switches. */
interface HeldCalls {
  readonly turns: Turns;
  /** Gives the pipeline its methods back. */
  free(): void;
}

function holdCalls(pipe: TransformersPipeline): HeldCalls {
  const turns = new Turns();
  const enter: Turns["call"] = (work) => turns.call(work);
  attached.add(pipe.model);
  const inner = hold(pipe.model, ["_call", "forward", "generate"], enter);
  const outer = hold(pipe, ["_call"], enter, { model: inner.inside });
  return {
    turns,
    free() {
      outer.free();
      inner.free();
      attached.delete(pipe.model);
    },
  };
}

/** What transformers.js reads of a session, beside runs. The metadata name the free dimensions of its first cache. */
type Shown = Signature & Record<"inputMetadata" | "outputMetadata" | "config", unknown>;

function shownOf({ inputNames, outputNames, inputMetadata, outputMetadata, config }: PipelineSession): Shown {
  return { inputNames, outputNames, inputMetadata, outputMetadata, config };
}

/** What the pipeline has in place of its own session. */
function standIn(shown: Shown, session: EigenSession<PipelineOrt>, kept: PipelineSession | undefined): object {
  return {
    ...shown,
    run: (feeds: Readonly<Record<string, never>>) => session.run(feeds),
    async release() {
      await session.close();
      await kept?.release();
    },
  };
}

interface Parts {
  pipe: TransformersPipeline;
  /** Which of the model's sessions is ours. */
  name: string;
  session: EigenSession<PipelineOrt>;
  held: HeldCalls;
  /** The pipeline's own session, and the same where it was not released. */
  own: PipelineSession;
  kept: PipelineSession | undefined;
  /** Finds the model again, where it was given by id. */
  find: (() => Promise<Found>) | undefined;
  ignore: readonly string[] | undefined;
}

/** A pack on a pipeline. Made by `attachPack`. */
export class AttachedPack {
  /**
   * What the pipeline runs now. For reading, `addTask`, and `run` with one task per row; a task switched to here
   * instead of by `switchTask` does not bring its labels, and does not wait for calls.
   */
  readonly session: EigenSession<PipelineOrt>;
  readonly #parts: Parts;
  readonly #labels: ConfigLabels;
  #closed = false;

  /** @internal */
  constructor(parts: Parts) {
    this.session = parts.session;
    this.#parts = parts;
    this.#labels = new ConfigLabels(parts.pipe.model.config);
  }

  /** What calls of the pipeline now belong to. */
  get task(): Selection {
    return this.session.task;
  }

  /** The pack's tasks by id, with their metadata. */
  get tasks(): ReadonlyMap<string, TaskInfo> {
    return this.session.tasks;
  }

  /**
   * Makes a task, a blend or the pristine base active, with its label names in `pipe.model.config`. Waits for calls of
   * the pipeline, of its model and of `generate` that are running, so that each belongs to one task from its first run
   * to its last; calls made after wait for the switch. When it fails or is aborted, the previous task stays whole. A
   * cache of keys and values that is handed from one `generate` to the next belongs to the task that made it.
   * @throws as `EigenSession.switchTask`
   */
  switchTask(selection: Selection, options: SwitchOptions = {}): Promise<SessionSwitchReport> {
    const { session, held, ignore } = this.#parts;
    const asked = copySelection(selection);
    return held.turns.change(async () => {
      const labels = await labelsOf(session.pack, asked, options.head, ignore);
      const report = await session.switchTask(asked, options);
      this.#labels.set(labels);
      return report;
    });
  }

  /** Resident bytes that come on top of what the pipeline's own session holds. */
  memory(): MemoryReport {
    return this.session.memory();
  }

  /**
   * Gives the pipeline its own session, labels and methods back, after the calls that are running, and releases ours. A
   * session that was not kept is made anew, from the id.
   * @throws BackendError when it was not kept and `model` was a file: pass `original: "keep"` to `attachPack`, or
   *   dispose of the pipeline. Nothing has changed then
   * @throws SourceError when the model's files are not found any more
   */
  close(): Promise<void> {
    const { pipe, name, session, held, own, kept, find } = this.#parts;
    return held.turns.change(async () => {
      if (this.#closed) return;
      pipe.model.sessions[name] = kept ?? (await remake(own, find));
      this.#closed = true;
      this.#labels.set("base");
      held.free();
      await session.close();
    });
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }
}

/** The label names in a model's configuration. */
class ConfigLabels {
  readonly #config: Record<string, unknown>;
  readonly #own: Readonly<Record<string, unknown>>;

  constructor(config: object) {
    this.#config = config as Record<string, unknown>;
    const { id2label, label2id, num_labels } = this.#config;
    this.#own = { id2label, label2id, num_labels };
  }

  set(labels: Labels): void {
    const named = (names: readonly string[]): object => ({
      id2label: Object.fromEntries(names.entries()),
      label2id: Object.fromEntries(names.map((name, id) => [name, id])),
      num_labels: names.length,
    });
    // Without names, transformers.js says LABEL_0, LABEL_1, …
    const numbered = { id2label: undefined, label2id: undefined, num_labels: undefined };
    Object.assign(this.#config, labels === "base" ? this.#own : labels === "numbered" ? numbered : named(labels));
  }
}

/**
 * A pipeline does not tell which onnxruntime it has. Taking turns, as onnxruntime-web must, is right for all of them.
 */
const ENV = { versions: { web: "of transformers.js" } };

/** Which session to replace. */
function partOf(pipe: TransformersPipeline, part: string | undefined): string {
  const sessions = (pipe as Partial<TransformersPipeline> | undefined)?.model?.sessions;
  if (typeof sessions !== "object" || sessions === null) {
    const what = "a pipeline of transformers.js 4, as `await pipeline(…)` gives it";
    throw new TypeError(`attachPack: the first argument must be ${what}`);
  }
  if (attached.has(pipe.model)) throw new TypeError("attachPack: the pipeline's model has a pack; close that first");
  const names = Object.keys(sessions);
  const known = names.map((name) => `"${name}"`).join(", ");
  if (part === undefined && names.length !== 1) {
    throw new TypeError(`attachPack: the model has the sessions ${known}; say which, { part }`);
  }
  const name = part ?? names[0]!;
  if (!names.includes(name)) {
    throw new TypeError(`part: the model has the sessions ${known}, got ${JSON.stringify(name)}`);
  }
  if (typeof (sessions[name] as { constructor: { create?: unknown } }).constructor.create !== "function") {
    throw new TypeError(`attachPack: the session "${name}" is not onnxruntime's own; something else has replaced it`);
  }
  return name;
}

/** Of the onnxruntime in use; what runs return is of another class where the package is there twice. */
function tensorClass({ tokenizer }: TransformersPipeline): PipelineOrt["Tensor"] {
  const tokenize = tokenizer as ((text: string) => { input_ids?: { ort_tensor?: object } }) | null | undefined;
  let cause: unknown;
  try {
    // No text at all: any other may hold words that a small vocabulary lacks.
    const Tensor = tokenize?.("").input_ids?.ort_tensor?.constructor;
    if (Tensor) return Tensor as PipelineOrt["Tensor"];
  } catch (error) {
    cause = error;
  }
  const message = "attachPack: no tokenizer of the pipeline shows onnxruntime's class of tensors; pass { Tensor }";
  throw new TypeError(message, cause === undefined ? undefined : { cause });
}

type Signature = Pick<OrtSession, "inputNames" | "outputNames">;

/** @throws TypeError when a session runs another model than the pipeline's own */
function refuseOther(session: Signature, own: Signature): void {
  const signature = ({ inputNames, outputNames }: Signature): string =>
    `${[...inputNames].sort().join(", ")} → ${[...outputNames].sort().join(", ")}`;
  if (signature(session) === signature(own)) return;
  const message = `\`model\` (${signature(session)}) is not what the pipeline runs (${signature(own)})`;
  throw new TypeError(`attachPack: ${message}`);
}
