/**
 * Parts of packs too large for one machine (docs/hub.md): written once, and described. A part that is there already, whole and made
 * of the same, is left alone.
 */
import { createHash } from "node:crypto";
import { createReadStream, existsSync } from "node:fs";
import { dirname, join, relative } from "node:path";
import type { Adapter } from "../adapters/adapter.ts";
import type { BaseFacts } from "../adapters/base-facts.ts";
import { describeBase } from "../adapters/describe-base.ts";
import { FormatError, SourceError } from "../errors.ts";
import { readModel } from "../onnx/read.ts";
import { externalFiles } from "../onnx/tensors.ts";
import { openPart, type PartKind } from "../pack/shard/statistics.ts";
import { VERSION } from "../version.ts";
import type { Result } from "./command.ts";
import { writeWhole } from "./files.ts";
import { type OptionSpec, output } from "./options.ts";
import { bytes, count, type Output, resources } from "./output.ts";
import { checkTarget, filesOf, stat } from "./target.ts";

/** Where a part is written to. */
export const part: OptionSpec<string> = output(
  "PART",
  "The part to write; kept as it is if it exists, whole and made of the same input.",
);

/** What there is to say of a part beside its size. */
interface PartFigures {
  readonly adapters: number;
  readonly modules: number;
  readonly gauge?: string;
  readonly warnings: readonly string[];
}

/** Which part is written, and where. */
interface PartTarget {
  readonly file: string;
  /** Replace what else is there. */
  readonly force: boolean;
  readonly kind: PartKind;
  /** Digest of what it is made of. */
  readonly made: string;
}

/**
 * Writes a part, unless a whole one made from the same is there. Parts need no lock: every writer writes the whole part, and nothing
 * changes it later. So a machine that is gone cannot keep another from making its part again.
 * @throws UsageError when something else is there, or a part that is damaged
 */
export async function makePart(
  { file, force, kind, made }: PartTarget,
  figures: PartFigures,
  make: () => Promise<AsyncIterable<Uint8Array>>,
): Promise<Result> {
  const found = existsSync(file) ? await wholePart(file, kind, made) : undefined;
  if (found === undefined) checkTarget(file, { force });
  const size = found ?? (await writeWhole(file, await make()));
  const present = found !== undefined;
  const { adapters, modules } = figures;
  const there = present ? ", already existed" : "";
  return {
    json: { file, ...figures, bytes: size, present, ...resources() },
    text: [`${file}: ${count(adapters, "adapter")}, ${count(modules, "module")}, ${bytes(size)}${there}`],
  };
}

/** Its size; undefined when it is damaged or another. */
async function wholePart(file: string, kind: PartKind, made: string): Promise<number | undefined> {
  try {
    const part = await openPart(file, kind);
    try {
      if (part.made !== made) return undefined;
      await part.verify();
      return part.byteLength;
    } finally {
      await part.close();
    }
  } catch (error) {
    if (error instanceof FormatError || error instanceof SourceError) return undefined;
    throw error;
  }
}

export function digest(...parts: unknown[]): string {
  return createHash("sha256")
    .update(JSON.stringify([VERSION, ...parts]))
    .digest("hex");
}

/** What is known of a base that adapters are read for: with another they mean another update. */
export async function facts(base: string | undefined): Promise<BaseFacts | null> {
  return base === undefined ? null : describeBase(base);
}

/** What adapters hold, whatever their files are called or dated. */
export async function contents(adapters: readonly Adapter[], out: Output): Promise<[id: string, digest: string][]> {
  const digests: [string, string][] = [];
  for (const [i, adapter] of adapters.entries()) {
    digests.push([adapter.id, await adapterDigest(adapter)]);
    out.progress({ stage: "reading", done: i + 1, total: adapters.length, unit: "adapters" });
  }
  return digests;
}

/** Digests by adapter: a part asks for those of all, and again for each. */
const known = new WeakMap<Adapter, Promise<string>>();

/** What the files of an adapter hold. */
export function adapterDigest(adapter: Adapter): Promise<string> {
  const digest = known.get(adapter) ?? hashed(adapter);
  known.set(adapter, digest);
  return digest;
}

async function hashed(adapter: Adapter): Promise<string> {
  const hash = createHash("sha256");
  for (const path of filesOf(adapter)) {
    if (!stat(path)?.isFile()) continue;
    hash.update(`${relative(adapter.file, path)}\n`);
    for await (const chunk of createReadStream(path)) hash.update(chunk as Uint8Array);
  }
  return hash.digest("hex");
}

/** What a model holds, with the files of its weights. */
export async function modelDigest(path: string): Promise<(string | null)[]> {
  if (!stat(path)?.isFile()) return [null];
  const file = await readModel(path);
  await file.close();
  const beside = [...externalFiles(file.model.graph.proto).keys()].sort().map((name) => join(dirname(path), name));
  return Promise.all([path, ...beside].map(fileDigest));
}

/** What a file holds; null where there is none: what needs it says so. */
export async function fileDigest(path: string): Promise<string | null> {
  if (!stat(path)?.isFile()) return null;
  const hash = createHash("sha256");
  try {
    for await (const chunk of createReadStream(path)) hash.update(chunk as Uint8Array);
  } catch {
    return null;
  }
  return hash.digest("hex");
}
