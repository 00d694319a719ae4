/**
 * The sessions that a pipeline of transformers.js gets in place of its own: how they are made, and what the pipeline sees
 * of them. Part of `eigenlora/transformers`, without an entry of its own.
 */
import type { Pack } from "../src/pack/pack.ts";
import { type GroupFile, groupOf } from "../src/session/group.ts";
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

/**
 * One session for one model; for several, one for each in which modules of the pack live.
 * @param found emptied: nothing of a model is held longer than it takes to load it
 * @param first the pipeline's own sessions, where they are released first
 */
export async function makeOurs(
  ort: PipelineOrt,
  found: Map<string, Found>,
  pack: Pack,
  options: Rest,
  first: OwnSessions | undefined,
): Promise<Whole> {
  const files = optionsOf(found, options);
  if (found.size > 1) return groupOf<OrtTypes<PipelineOrt>, string>(engines(files, ort, first), pack, "skip");
  const [{ name, model, given }] = files as Iterable<Given> as [Given];
  await first?.get(name)?.release();
  return createEigenSession(ort, model, pack, given);
}

interface Given {
  readonly name: string;
  readonly model: SourceInput;
  readonly given: Rest;
}

function* optionsOf(found: Map<string, Found>, options: Rest): Generator<Given> {
  for (const [name, { model, session, externalData }] of found) {
    found.delete(name);
    const external = externalData && { external: externalFiles(externalData) };
    yield { name, model, given: { ...external, ...options, session: { ...session, ...options.session } } };
  }
}

function* engines(
  files: Iterable<Given>,
  ort: PipelineOrt,
  first: OwnSessions | undefined,
): Generator<GroupFile<string>> {
  for (const { name, model, given } of files) {
    const { session, ...options } = given;
    const before = first && ((): Promise<void> => first.get(name)!.release());
    yield { name, engine: createEngine(ort, session), model, options: options as GroupFile<string>["options"], before };
  }
}

/** The one model that was handed over. */
export function foundOnly(own: OwnSessions, model: SourceInput): Map<string, Found> {
  return new Map([...own].map(([name, { config }]) => [name, handedOver(model, config?.device)]));
}

/** Sessions by the pipeline's names, of which the first is that of a single one. */
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

/** What the pipeline has in place of one of its own sessions. */
export function standIn(
  shown: Shown,
  session: EigenSession<PipelineOrt>,
  whole: Whole,
  kept: PipelineSession | undefined,
): object {
  return {
    ...shown,
    run: (feeds: Readonly<Record<string, never>>) => session.run(feeds),
    async release() {
      await whole.close();
      await kept?.release();
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
