/**
 * Several files of one model, an encoder and a decoder, a UNet and its text encoders: which modules of the pack live in
 * which, a session on each, and one switch for all.
 */
import type { Pack, TaskInfo } from "../core/pack.ts";
import { partOf } from "../core/part.ts";
import {
  cannotPutBack,
  copySelection,
  type MemoryReport,
  memoryReport,
  type Selection,
  Switching,
} from "../core/selection.ts";
import { BackendError, BaseMismatchError, checkArgument, checkOptions, checkPack, described } from "../errors.ts";
import { isOfModule, moduleOf } from "../format/format.ts";
import { type ModelFile, readModel } from "../onnx/read.ts";
import type { SourceInput } from "../source.ts";
import { type Engine, Queue } from "./engine.ts";
import { ModelMatcher, type Table } from "./match.ts";
import { SESSION_OPTIONS, type SessionOptions, type SessionSwitchOptions } from "./options.ts";
import { broughtBy } from "./prepare.ts";
import {
  checkModes,
  type Session,
  type SessionSwitchReport,
  type SessionTypes,
  sessionOn,
  tellReady,
} from "./session.ts";

/** Options of `createSessions`: of all sessions. */
export interface GroupOptions extends Omit<SessionOptions, "trainable"> {
  /** Options of a file's own session, by its name here, in place of those of all. */
  readonly each?: Readonly<Record<string, Omit<SessionOptions, "trainable">>> | undefined;
}

/**
 * Prepares several files of one model for all tasks of a pack. Each module goes to the files that it lives in: those
 * whose weight fits its fingerprint, or has its whole name.
 * @param models bytes, paths, URLs or Blobs by names of your own
 * @throws BaseMismatchError when a module or a parameter of a task lives in none of the files, a file has nothing of
 *   the pack; otherwise as `createSession`
 */
export async function createSessions<T extends SessionTypes, Name extends string>(
  engine: Engine,
  models: Readonly<Record<Name, SourceInput>>,
  pack: Pack,
  options: GroupOptions = {},
): Promise<SessionGroup<T, Name>> {
  checkArgument("createSessions", engine, "an engine (createEngine(ort))", "load");
  checkPack("createSessions", pack);
  checkOptions("createSessions", options as GroupOptions & SessionOptions, [...SESSION_OPTIONS, "each"]);
  const names = Object.keys(models ?? {}) as Name[];
  if (names.length === 0)
    throw new TypeError(`createSessions: models: expected files by name, got ${described(models)}`);
  const { each = {}, ...common } = options;
  checkEach("createSessions", each, names, SESSION_OPTIONS);
  if ((common as SessionOptions).trainable)
    throw new TypeError("createSessions: trainable: one session learns at a time; use createSession on one file");
  const files = names.map((name) => ({ name, engine, model: models[name], options: { ...common, ...each[name] } }));
  return groupOf<T, Name>(files, pack, "refuse");
}

/** @throws TypeError for a name of no session, for unknown options, and for a session that is to learn */
export function checkEach(
  where: string,
  each: Readonly<Record<string, SessionOptions>>,
  names: readonly string[],
  known: readonly string[],
): void {
  for (const [name, options] of Object.entries(each)) {
    if (!names.includes(name)) {
      const all = names.map((one) => `"${one}"`).join(", ");
      throw new TypeError(`${where}: each: there is no session "${name}", only ${all}`);
    }
    checkOptions<SessionOptions, typeof SESSION_OPTIONS>(`${where}: each.${name}`, options, known as never);
    if (options.trainable) throw new TypeError(`${where}: each.${name}: trainable: one session learns at a time`);
  }
}

/** A file that becomes one of several sessions. */
export interface GroupFile<Name extends string> {
  readonly name: Name;
  readonly engine: Engine;
  readonly model: SourceInput;
  /** Checked already. */
  readonly options: SessionOptions;
}

/**
 * Sessions on files, one after the other: each file is let go before the next is asked for.
 * @param empty "refuse" or "skip" a file in which nothing of the pack lives
 */
export async function groupOf<T extends SessionTypes, Name extends string>(
  files: Iterable<GroupFile<Name>>,
  pack: Pack,
  empty: "refuse" | "skip",
): Promise<SessionGroup<T, Name>> {
  const sessions = new Map<Name, Session<T>>();
  const residence = new Residence(pack, empty);
  let told: [model: string, onProgress: SessionOptions["onProgress"]] | undefined;
  try {
    for (const { name, engine, model, options } of files) {
      checkModes(options);
      const file = await readModel(model, { ...options, weightsApart: engine.readsFiles });
      told = [file.model.name, options.onProgress];
      const modules = await residence.in(file, name, options).catch(async (error: unknown) => {
        await file.close();
        throw error;
      });
      if (modules) sessions.set(name, await sessionOn<T>(engine, file, pack, { ...options, modules }));
      else await file.close();
    }
    residence.refuseUnmatched();
    if (sessions.size === 0) throw new BaseMismatchError(`nothing of ${pack.name} lives in the files`, { module: "" });
    const group = new SessionGroup<T, Name>(pack, sessions);
    await tellReady(...told!);
    return group;
  } catch (error) {
    for (const session of sessions.values()) await session.close();
    throw error;
  }
}

/** Sessions on the files of one model. Made by `createSessions`, or the function of a binding. */
export class SessionGroup<
  T extends SessionTypes = SessionTypes,
  Name extends string = string,
> extends Switching<SessionSwitchReport> {
  readonly pack: Pack;
  /** Sessions by the names that the files were given. Switch tasks here, not there. */
  readonly sessions: Readonly<Record<Name, Session<T>>>;
  readonly #all: readonly Session<T>[];
  readonly #queue = new Queue();
  /** Options of the last switch, but for its signal. */
  #options: SessionSwitchOptions = {};
  #task: Selection = null;
  #closed: Promise<void> | undefined;

  /** @internal Use `createSessions`, or the function of a binding. */
  constructor(pack: Pack, sessions: ReadonlyMap<Name, Session<T>>) {
    super();
    this.pack = pack;
    this.sessions = Object.fromEntries(sessions) as Record<Name, Session<T>>;
    this.#all = [...sessions.values()];
    for (const session of this.#all) session.group = this;
  }

  /** The selection that runs now belong to. */
  get task(): Selection {
    return this.#task;
  }

  /** The pack's tasks by id, with their metadata. */
  get tasks(): ReadonlyMap<string, TaskInfo> {
    return this.pack.tasks;
  }

  /**
   * Makes a task, a blend or the base active in all sessions, or in none: when one fails or is aborted, the others get
   * back what they had. Waits for calls that are under way.
   * @throws as `Session.switchTask`; BackendError with both causes when a session cannot be put back
   */
  switchTask(selection: Selection, options: SessionSwitchOptions = {}): Promise<SessionSwitchReport> {
    checkOptions("switchTask", options, ["signal", "head", "keepCache"]);
    const asked = copySelection(selection);
    return this.#queue.alone(() => this.switching(asked, () => this.#switch(asked, options)));
  }

  async #switch(asked: Selection, options: SessionSwitchOptions): Promise<SessionSwitchReport> {
    const reports: SessionSwitchReport[] = [];
    try {
      for (const session of this.#all) reports.push(await session.switchTask(asked, options));
    } catch (error) {
      // The one that failed has kept what it had.
      const failed: unknown[] = [];
      for (const session of this.#all.slice(0, reports.length))
        await session.switchTask(this.#task, this.#options).catch((again: unknown) => failed.push(again));
      if (failed.length > 0) throw cannotPutBack(error, failed[0], "sessions");
      throw error;
    }
    const { signal: _, ...others } = options;
    this.#options = others;
    this.#task = asked;
    return sumOf(reports);
  }

  /** @internal */
  override heard(type: string): void {
    if (type !== "devicelost") return;
    // Sessions of one runtime have one device: the first event is enough.
    const once = new AbortController();
    for (const session of this.#all)
      session.addEventListener(
        type,
        ({ detail }) => {
          once.abort();
          this.tell("devicelost", detail);
        },
        { signal: once.signal },
      );
  }

  /**
   * Runs that belong together, an encoder's and its decoder's: switches wait until the work is done, and the work
   * begins when the switches asked for before are.
   * @example
   * const { last_hidden_state } = await models.call(({ encoder }) => encoder.run({ input_ids, attention_mask }));
   */
  call<Result>(work: (sessions: Readonly<Record<Name, Session<T>>>) => Promise<Result>): Promise<Result> {
    if (this.#closed) throw new BackendError("these sessions are closed; make new ones", { backend: "sessions" });
    return this.#queue.call(() => work(this.sessions));
  }

  /** Sum of the sessions' memory; task blobs are shared, and counted once. */
  memory(): MemoryReport {
    const [first, ...others] = this.#all.map((session) => session.memory());
    const { total: _, ...sum } = { ...first! };
    for (const { total: __, coefficients: ___, ...one } of others)
      for (const [owner, bytes] of Object.entries(one)) sum[owner as keyof typeof one] += bytes;
    return memoryReport(sum);
  }

  /** Waits for calls and switches under way, then frees everything. The pack stays open. */
  close(): Promise<void> {
    this.#closed ??= this.#queue.alone(async () => {
      for (const session of this.#all) await session.close();
    });
    return this.#closed;
  }
}

function sumOf(reports: readonly SessionSwitchReport[]): SessionSwitchReport {
  return reports.reduce((a, b) => ({
    task: a.task,
    bytesRead: a.bytesRead + b.bytesRead,
    requests: a.requests + b.requests,
    bytesFed: a.bytesFed + b.bytesFed,
    milliseconds: {
      read: a.milliseconds.read + b.milliseconds.read,
      compute: a.milliseconds.compute + b.milliseconds.compute,
      total: a.milliseconds.total + b.milliseconds.total,
    },
  }));
}

/** Finds out which modules and parameters of a pack live in which file of a model. */
export class Residence {
  readonly #pack: Pack;
  readonly #empty: "refuse" | "skip";
  /** Modules and parameters that a file has, and the reasons of the files that lack one. */
  readonly #found = new Set<string>();
  readonly #reasons = new Map<string, string[]>();
  /** Embeddings whose rows tasks replace: their shapes, and weights of files that lack them. */
  readonly #tables = new Map<string, { shape?: string | undefined; elsewhere: { file: string; weight: Table }[] }>();

  /** @param empty "refuse" or "skip" a file in which nothing of the pack lives */
  constructor(pack: Pack, empty: "refuse" | "skip") {
    this.#pack = pack;
    this.#empty = empty;
  }

  /**
   * @returns the filter for what lives in a file; undefined where nothing does and that is no error
   * @throws BaseMismatchError where it is
   */
  async in(file: ModelFile, name: string, options: SessionOptions): Promise<((module: string) => boolean) | undefined> {
    const view = options.modules ? partOf(this.#pack, options.modules) : this.#pack;
    const bases = await this.#pack.bases(options);
    try {
      const matcher = new ModelMatcher(file, options);
      const brought = (await broughtBy(view, options)).filter(
        (entry) => !isOfModule(entry.role) && !matcher.ignores(entry.name),
      );
      const parameters = new Set(brought.map((entry) => entry.name));
      const residents = await matcher.residents(view.modules, parameters, bases.bytes);
      const here = new Set<string>();
      const elsewhere = new Set<string>();
      for (const [resident, why] of residents) {
        const module = parameters.has(resident) ? moduleOf(resident) : resident;
        (why === undefined ? here : elsewhere).add(module);
        if (why === undefined) this.#found.add(resident);
        else this.#reasons.set(resident, [...(this.#reasons.get(resident) ?? []), `${name}: ${why}`]);
      }
      for (const { role, name: table } of brought) {
        if (role !== "rows") continue;
        const known = this.#tables.get(table) ?? { elsewhere: [] };
        this.#tables.set(table, known);
        if (residents.get(table) === undefined) known.shape ??= matcher.shapeOfTable(table);
        else for (const weight of matcher.tables()) known.elsewhere.push({ file: name, weight });
      }
      if (view.modules.some((module) => here.has(module.name))) return filterOf(here, elsewhere, options.modules);
      // A file that has only a head is not skipped: the head would be lost.
      if (here.size === 0 && this.#empty === "skip") return undefined;
      const [first] = view.modules;
      const why = first && `; "${first.name}": ${residents.get(first.name)}`;
      const only = here.size > 0 ? `, only "${[...here].join('", "')}", which the option \`ignore\` leaves out` : "";
      const message = `${name}: no module of ${this.#pack.name} lives in this file${only}${why}. Run it by itself, without the pack`;
      throw new BaseMismatchError(message, { module: first?.name ?? "" });
    } finally {
      bases.close();
    }
  }

  /** @throws BaseMismatchError for what lives in none of the files whose options ask for it */
  refuseUnmatched(): void {
    for (const [name, { shape, elsewhere }] of this.#tables) {
      const alike = elsewhere.find(({ weight }) => weight.shape === shape);
      if (!alike) continue;
      const { file, weight } = alike;
      const module = moduleOf(name);
      const advice = `Say so with \`names\` of that file, "${module}" to "${weight.name}"; or leave it as it is, with ignore: ["${weight.name}"]`;
      const message = `tasks replace rows of "${name}", and "${weight.name}" of ${file}, which has the same shape, may be tied to it`;
      throw new BaseMismatchError(`${message}: there is no telling across files. ${advice}`, { module });
    }
    for (const [name, reasons] of this.#reasons) {
      if (this.#found.has(name)) continue;
      const isPipeline = this.#empty === "skip";
      const advice = isPipeline ? "Use the model that the adapters are for" : "Give the file that has it";
      const message = `"${name}" lives in none of the ${isPipeline ? "sessions" : "files"} (${reasons.join("; ")}). ${advice}, or leave it out with the option \`modules\``;
      throw new BaseMismatchError(message, { module: name });
    }
  }
}

/**
 * The filter that a session keeps. Made here, since a closure of `Residence` would keep the model's bytes with it.
 * Modules of tasks that are added later pass: they are not known to live elsewhere, and the session says that it is not
 * prepared for them.
 */
function filterOf(
  here: ReadonlySet<string>,
  elsewhere: ReadonlySet<string>,
  wanted: SessionOptions["modules"],
): (module: string) => boolean {
  return (module) => here.has(module) || !(elsewhere.has(module) || wanted?.(module) === false);
}
