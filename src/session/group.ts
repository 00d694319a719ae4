/**
 * Several files of one model, an encoder and a decoder, a UNet and its text encoders: which modules of the pack live in which, a session
 * on each, and one switch for all.
 */
import { checkArgument, checkChoice, checkOptions, checkPack, described } from "../arguments.ts";
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
import { BackendError, BaseMismatchError } from "../errors.ts";
import type { DetailedEvent } from "../events.ts";
import { isOfModule, moduleOf } from "../format/format.ts";
import { type ModelFile, readModel } from "../onnx/read.ts";
import { tellReady } from "../open-source.ts";
import { Queue } from "../queue.ts";
import type { SourceInput } from "../source.ts";
import { sessionOn } from "./create-session.ts";
import type { Engine } from "./engine.ts";
import { ModelMatcher, type Table } from "./match.ts";
import { SESSION_OPTIONS, type SessionOptions, type SessionSwitchOptions } from "./options.ts";
import { broughtBy } from "./prepare.ts";
import type { Session, SessionSwitchReport, SessionTypes } from "./session.ts";

/** Options of `createSessions`: of all sessions. */
export interface GroupOptions extends Omit<SessionOptions, "trainable"> {
  /** Options of a file's own session, by its name here, in place of those of all. */
  readonly each?: Readonly<Record<string, Omit<SessionOptions, "trainable">>> | undefined;
}

/**
 * Prepares several files of one model for all tasks of a pack. Each module goes to the files that it lives in: those whose weight fits
 * its fingerprint, or has its whole name.
 * @param models bytes, paths, URLs or Blobs by names of your own
 * @throws BaseMismatchError when a module or a parameter of a task lives in none of the files, a file has nothing of the pack; otherwise as
 *   `createSession`
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
  const stranger = Object.keys(each).find((name) => !(names as string[]).includes(name));
  if (stranger !== undefined)
    throw new TypeError(`createSessions: each: there is no file "${stranger}", only ${names.join(", ")}`);
  const files = names.map((name): GroupFile<Name> => {
    const own: SessionOptions = { ...common, ...each[name] };
    checkOptions(`createSessions: each.${name}`, own, SESSION_OPTIONS);
    if (own.trainable) {
      const advice = "use createSession on one file";
      throw new TypeError(`createSessions: trainable: one session learns at a time; ${advice}`);
    }
    return { name, engine, model: models[name], options: own };
  });
  return groupOf<T, Name>(files, pack, "refuse");
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
 * Sessions on files, one file after the other: each is let go before the next is asked for.
 * @param empty what becomes of a file in which nothing of the pack lives
 * @throws as `createSessions`
 */
export async function groupOf<T extends SessionTypes, Name extends string>(
  files: Iterable<GroupFile<Name>>,
  pack: Pack,
  empty: "refuse" | "skip",
): Promise<SessionGroup<T, Name>> {
  const sessions = new Map<Name, Session<T>>();
  const lacking = lackingNothing();
  let told: [model: string, onProgress: SessionOptions["onProgress"]] | undefined;
  try {
    for (const { name, engine, model, options } of files) {
      checkChoice("mode", options.mode ?? "auto", ["auto", "core", "factors", "folded"]);
      checkChoice("components", options.components ?? "stored", ["stored", "f32"]);
      const file = await readModel(model, { ...options, weightsApart: engine.readsFiles });
      told = [file.model.name, options.onProgress];
      let modules: ((module: string) => boolean) | undefined;
      try {
        modules = await residentsOf(file, name, pack, options, lacking, empty);
      } catch (error) {
        await file.close();
        throw error;
      }
      if (modules) sessions.set(name, await sessionOn<T>(engine, file, pack, { ...options, modules }));
      else await file.close();
    }
    refuseHomeless(lacking, empty);
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
  #how: SessionSwitchOptions = {};
  #task: Selection = null;
  #closed: Promise<void> | undefined;
  #watched = false;

  /** @internal Use `createSessions`, or the function of a binding. */
  constructor(pack: Pack, sessions: ReadonlyMap<Name, Session<T>>) {
    super();
    this.pack = pack;
    this.sessions = Object.fromEntries(sessions) as Record<Name, Session<T>>;
    this.#all = [...sessions.values()];
    for (const session of this.#all) session.group = this;
  }

  /** What runs now belong to. */
  get task(): Selection {
    return this.#task;
  }

  /** The pack's tasks by id, with their metadata. */
  get tasks(): ReadonlyMap<string, TaskInfo> {
    return this.pack.tasks;
  }

  /**
   * Makes a task, a blend or the base active in all sessions, or in none: when one fails or is aborted, the others get back what they
   * had. Waits for calls that are under way.
   * @throws as `Session.switchTask`; BackendError with both causes when a session cannot be put back
   */
  switchTask(selection: Selection, options: SessionSwitchOptions = {}): Promise<SessionSwitchReport> {
    checkOptions("switchTask", options, ["signal", "head", "keepCache"]);
    const asked = copySelection(selection);
    return this.#queue.alone(() => this.switching(asked, () => this.#switch(asked, options)));
  }

  async #switch(asked: Selection, options: SessionSwitchOptions): Promise<SessionSwitchReport> {
    const [task, how] = [this.task, this.#how];
    const reports: SessionSwitchReport[] = [];
    try {
      for (const session of this.#all) reports.push(await session.switchTask(asked, options));
    } catch (error) {
      // The one that failed has kept what it had.
      const failed: unknown[] = [];
      for (const session of this.#all.slice(0, reports.length))
        await session.switchTask(task, how).catch((again: unknown) => failed.push(again));
      if (failed.length > 0) throw cannotPutBack(error, failed[0], "sessions");
      throw error;
    }
    const { signal: _, ...others } = options;
    this.#how = others;
    this.#task = asked;
    return sumOf(reports);
  }

  /** @internal */
  override heard(type: string): void {
    if (type !== "devicelost" || this.#watched) return;
    this.#watched = true;
    // Sessions of one runtime have one device: the first that tells is enough.
    const once = new AbortController();
    const tell = ({ detail }: DetailedEvent<{ readonly message: string }>): void => {
      once.abort();
      this.tell("devicelost", detail);
    };
    for (const session of this.#all) session.addEventListener("devicelost", tell, { signal: once.signal });
  }

  /**
   * Runs that belong together, an encoder's and its decoder's: switches wait until the work is done, and the work begins when the switches
   * asked for before are.
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

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }
}

function sumOf(reports: readonly SessionSwitchReport[]): SessionSwitchReport {
  const sum = (of: (report: SessionSwitchReport) => number): number => reports.reduce((all, one) => all + of(one), 0);
  return {
    task: reports[0]!.task,
    bytesRead: sum(({ bytesRead }) => bytesRead),
    requests: sum(({ requests }) => requests),
    bytesFed: sum(({ bytesFed }) => bytesFed),
    milliseconds: {
      read: sum(({ milliseconds }) => milliseconds.read),
      compute: sum(({ milliseconds }) => milliseconds.compute),
      total: sum(({ milliseconds }) => milliseconds.total),
    },
  };
}

/** Modules and parameters of a pack that files lack. */
export interface Lacking {
  /** Reasons by file; undefined once a file has them. */
  readonly reasons: Map<string, Map<string, string> | undefined>;
  /** Embeddings whose rows tasks replace: their shapes, and weights of files that lack them. */
  readonly tables: Map<
    string,
    { shape?: string | undefined; readonly elsewhere: { readonly file: string; readonly weight: Table }[] }
  >;
}

export const lackingNothing = (): Lacking => ({ reasons: new Map(), tables: new Map() });

/** The filter for what lives in a file, undefined where nothing does and that is no error. Notes what does not live there in `lacking`. */
export async function residentsOf(
  file: ModelFile,
  name: string,
  pack: Pack,
  options: SessionOptions,
  lacking: Lacking,
  empty: "refuse" | "skip",
): Promise<((module: string) => boolean) | undefined> {
  const { modules: wanted } = options;
  const view = wanted ? partOf(pack, wanted) : pack;
  const bases = await pack.bases(options);
  try {
    const matcher = new ModelMatcher(file, options);
    const brought = (await broughtBy(view, options)).filter(({ role }) => !isOfModule(role));
    const parameters = new Set(brought.map((one) => one.name).filter((one) => !matcher.ignores(one)));
    const residents = await matcher.residents(view.modules, parameters, bases.bytes);
    const [here, elsewhere] = [new Set<string>(), new Set<string>()];
    for (const [one, why] of residents) {
      const module = parameters.has(one) ? moduleOf(one) : one;
      (why === undefined ? here : elsewhere).add(module);
      const { reasons } = lacking;
      if (why === undefined) reasons.set(one, undefined);
      else if (reasons.has(one)) reasons.get(one)?.set(name, why);
      else reasons.set(one, new Map([[name, why]]));
    }
    for (const { name: table } of brought.filter(({ role, name }) => role === "rows" && parameters.has(name))) {
      const known = lacking.tables.get(table) ?? { elsewhere: [] };
      lacking.tables.set(table, known);
      if (residents.get(table) === undefined) known.shape ??= matcher.shapeOfTable(table);
      else for (const weight of matcher.tables()) known.elsewhere.push({ file: name, weight });
    }
    if (view.modules.some((module) => here.has(module.name))) return filterOf(here, elsewhere, wanted);
    // A file that has only a head is not skipped: the head would be lost.
    if (here.size === 0 && empty === "skip") return undefined;
    const [first] = view.modules;
    const why = first && `; "${first.name}": ${residents.get(first.name)}`;
    const only = here.size > 0 ? `, only "${[...here].join('", "')}", which the option \`ignore\` leaves out` : "";
    const message = `${name}: no module of ${pack.name} lives in this file${only}${why}. Run it by itself, without the pack`;
    throw new BaseMismatchError(message, { module: first?.name ?? "" });
  } finally {
    bases.close();
  }
}

/**
 * The filter that a session keeps. Made here, since a closure of `residentsOf` would keep the model's bytes with it. Modules of tasks that
 * are added later pass: they are not known to live elsewhere, and the session says that it is not prepared for them.
 */
function filterOf(
  here: ReadonlySet<string>,
  elsewhere: ReadonlySet<string>,
  wanted: SessionOptions["modules"],
): (module: string) => boolean {
  return (module) => here.has(module) || !(elsewhere.has(module) || wanted?.(module) === false);
}

/** @throws BaseMismatchError for what lives in none of the files whose options ask for it */
export function refuseHomeless({ reasons: all, tables }: Lacking, empty: "refuse" | "skip"): void {
  for (const [name, { shape, elsewhere }] of tables) {
    const alike = elsewhere.find(({ weight }) => weight.shape === shape);
    if (!alike) continue;
    const { file, weight } = alike;
    const module = moduleOf(name);
    const advice = `Say so with \`names\` of that file, "${module}" to "${weight.name}"; or leave it as it is, with ignore: ["${weight.name}"]`;
    const message = `tasks replace rows of "${name}", and "${weight.name}" of ${file}, which has the same shape, may be tied to it`;
    throw new BaseMismatchError(`${message}: there is no telling across files. ${advice}`, { module });
  }
  for (const [name, reasons] of all) {
    if (!reasons) continue;
    const whys = [...reasons].map(([file, why]) => `${file}: ${why}`).join("; ");
    const [places, advice] =
      empty === "skip"
        ? ["sessions", "Use the model that the adapters are for"]
        : ["files", "Give the file that has it"];
    const message = `"${name}" lives in none of the ${places} (${whys}). ${advice}, or leave it out with the option \`modules\``;
    throw new BaseMismatchError(message, { module: name });
  }
}
