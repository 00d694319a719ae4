/**
 * The sessions that a pipeline of transformers.js gets in place of its own: how they are made, and what the pipeline sees
 * of them. Part of `eigenlora/transformers`, without an entry of its own.
 */
import { checkOptions } from "../src/arguments.ts";
import type { Pack } from "../src/core/pack.ts";
import { BaseMismatchError } from "../src/errors.ts";
import { type GroupFile, groupOf } from "../src/session/group.ts";
import { SESSION_OPTIONS } from "../src/session/options.ts";
import type { SourceInput } from "../src/source.ts";
import {
  createEigenSession,
  createEngine,
  type EigenSession,
  type EigenSessionOptions,
  type EigenSessions,
  type OrtSession,
  type OrtTypes,
} from "./onnxruntime.ts";
import {
  externalFiles,
  type Find,
  type Found,
  handedOver,
  type OwnSessions,
  type PipelineModel,
  type PipelineOrt,
  type PipelineSession,
  remake,
} from "./transformers-model.ts";

/** One session of ours, or several that switch together. */
export type Whole = EigenSession<PipelineOrt> | EigenSessions<PipelineOrt>;

/** The options of `attachPack` that go on to sessions. */
export type Rest = EigenSessionOptions<PipelineOrt>;

/** Options of one session of several, by its name. */
export type Each = Readonly<Record<string, Omit<Rest, "trainable">>>;

/** @throws TypeError for a name that is none of the sessions', and for unknown options */
export function checkEach(each: Each, names: readonly string[]): void {
  for (const [name, options] of Object.entries(each)) {
    if (!names.includes(name)) {
      const known = names.map((one) => `"${one}"`).join(", ");
      throw new TypeError(`attachPack: each: there is no session "${name}", only ${known}`);
    }
    const given: Rest = options;
    checkOptions(`attachPack: each.${name}`, given, [...SESSION_OPTIONS, "session"]);
    if (given.trainable) {
      throw new TypeError(
        `attachPack: each.${name}: trainable: one session learns at a time; pass { part, trainable }`,
      );
    }
  }
}

/** Parameters that all sessions leave out, each by its options. */
export function ignoredByAll(names: readonly string[], ignore: Rest["ignore"], each: Each): readonly string[] {
  const [first = [], ...others] = names.map((name) => each[name]?.ignore ?? ignore ?? []);
  return first.filter((one) => others.every((list) => list.includes(one)));
}

/**
 * One session for one model; for several, one for each in which modules of the pack live.
 * @param found emptied: nothing of a model is held longer than it takes to load it
 */
export async function makeOurs(
  ort: PipelineOrt,
  found: Map<string, Found>,
  pack: Pack,
  options: Rest,
  each: Each,
): Promise<Whole> {
  const files = optionsOf(found, options, each);
  if (found.size > 1) return groupOf<OrtTypes<PipelineOrt>, string>(engines(files, ort), pack, "skip");
  const [{ name, model, given }] = files as Iterable<Given> as [Given];
  try {
    return await createEigenSession(ort, model, pack, given);
  } catch (error) {
    if (!(error instanceof BaseMismatchError)) throw error;
    // The message names the session as transformers.js does.
    const { message, module, candidates } = error;
    throw new BaseMismatchError(`session "${name}": ${message}`, { module, ...(candidates && { candidates }) });
  }
}

interface Given {
  readonly name: string;
  readonly model: SourceInput;
  readonly given: Rest;
}

function* optionsOf(found: Map<string, Found>, options: Rest, each: Each): Generator<Given> {
  for (const [name, { model, session, externalData }] of found) {
    found.delete(name);
    const external = externalData && { external: externalFiles(externalData) };
    const own = each[name];
    const sessions = { ...session, ...options.session, ...own?.session };
    yield { name, model, given: { ...external, ...options, ...own, session: sessions } };
  }
}

function* engines(files: Iterable<Given>, ort: PipelineOrt): Generator<GroupFile<string>> {
  for (const { name, model, given } of files) {
    const { session, ...options } = given;
    yield { name, engine: createEngine(ort, session), model, options: options as GroupFile<string>["options"] };
  }
}

/** The one model that was handed over. */
export function foundOnly(own: OwnSessions, model: SourceInput): Map<string, Found> {
  return new Map([...own].map(([name, { config }]) => [name, handedOver(model, config?.device)]));
}

/** Sessions by the pipeline's names; a single one has the first name. */
export function byName(names: readonly string[], whole: Whole): Readonly<Record<string, EigenSession<PipelineOrt>>> {
  return "sessions" in whole ? whole.sessions : { [names[0]!]: whole };
}

/** What transformers.js reads of a session, beside runs. The metadata name the free dimensions of its first cache. */
type Shown = Signature & Record<"inputMetadata" | "outputMetadata" | "config", unknown>;

export function shownOf(own: OwnSessions): Map<string, Shown> {
  const shown = ({ inputNames, outputNames, inputMetadata, outputMetadata, config }: PipelineSession): Shown => ({
    inputNames,
    outputNames,
    inputMetadata,
    outputMetadata,
    config,
  });
  return new Map([...own].map(([name, session]) => [name, shown(session)]));
}

/** Ours that the pipeline has released. */
const disposed = new WeakSet<Whole>();

/** Whether the pipeline was disposed of, and our sessions with it. */
export function isDisposed(whole: Whole): boolean {
  return disposed.has(whole);
}

/** What the pipeline has in place of one of its own sessions. */
export function standIn(shown: Shown, session: EigenSession<PipelineOrt>, whole: Whole): object {
  return {
    ...shown,
    run: (feeds: Readonly<Record<string, never>>) => session.run(feeds),
    async release() {
      disposed.add(whole);
      await whole.close();
    },
  };
}

/** Releases the pipeline's own sessions; when one refuses, those before it are made anew. */
export async function releaseAll(model: PipelineModel, own: OwnSessions, find: Find | undefined): Promise<void> {
  const released = new Map<string, PipelineSession>();
  try {
    for (const [name, session] of own) {
      await session.release();
      released.set(name, session);
    }
  } catch (error) {
    Object.assign(model.sessions, Object.fromEntries(await remake(released, find)));
    throw error;
  }
}

type Signature = Pick<OrtSession, "inputNames" | "outputNames">;

/** @throws TypeError when a session runs another model than the pipeline's own */
export function refuseOther(session: Signature, own: Signature): void {
  const signature = ({ inputNames, outputNames }: Signature): string =>
    `${[...inputNames].sort().join(", ")} → ${[...outputNames].sort().join(", ")}`;
  if (signature(session) === signature(own)) return;
  const message = `\`model\` (${signature(session)}) is not what the pipeline runs (${signature(own)})`;
  throw new TypeError(`attachPack: ${message}`);
}
