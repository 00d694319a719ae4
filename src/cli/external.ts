/**
 * The files that hold weights of an ONNX model, on their way to where a new one looks for them. The model's author has named them:
 * nothing is read or written outside the folders that the user has named, links included.
 */
import { existsSync, rmSync } from "node:fs";
import { realpath } from "node:fs/promises";
import { dirname, isAbsolute, join, relative, resolve, sep } from "node:path";
import { SourceError } from "../errors.ts";
import type { ModelFile } from "../onnx/read.ts";
import { externalFiles } from "../onnx/tensors.ts";
import { openSource } from "../open-source.ts";
import type { ByteSource } from "../source.ts";
import { writeWhole } from "./files.ts";
import { UsageError } from "./options.ts";
import type { Run } from "./run.ts";
import { checkTarget } from "./target.ts";

/** Weights beside a model may be larger than memory: so much of them is copied at a time. */
const CHUNK_BYTES = 2 ** 24;

/** A file beside the model, by the model's name for it, and where it goes. */
export interface Placed {
  readonly location: string;
  readonly path: string;
}

/**
 * Where the files beside a model go: nothing is read or written yet.
 * @param model path or URL
 * @param target of the new model
 * @param files and `folders` that are written too
 * @throws FormatError when one has a name outside the model's folder
 * @throws UsageError when one would lie where something else is written
 * @throws SourceError when a link leads out of the model's folder, or out of the target's
 */
export async function placesOf(
  file: ModelFile,
  model: string,
  target: string,
  files: readonly string[],
  folders: readonly string[],
): Promise<Placed[]> {
  for (const folder of folders) await refuseLeaving(dirname(target), folder);
  const places: Placed[] = [];
  for (const location of externalFiles(file.model.graph.proto).keys()) {
    // Refuses, in its own words, what is outside by its name.
    if (isAbsolute(location) || !isInside(resolve("."), resolve(location))) await file.external!(location);
    const path = join(dirname(target), location);
    checkTarget(target, { force: true, inputs: [path] });
    const taken =
      files.find((own) => resolve(own) === resolve(path)) ??
      folders.find((own) => isInside(resolve(own), resolve(path)));
    if (taken !== undefined) {
      throw new UsageError(`--output ${target}: ${taken} is where weights of the model go; choose another name`);
    }
    if (!/^https?:/i.test(model)) await refuseStraying(model, location);
    await refuseLeaving(dirname(target), path);
    places.push({ location, path });
  }
  return places;
}

/**
 * Copies what does not lie there already; a copy goes again when the command fails.
 * @returns the paths
 * @throws SourceError when another file lies there
 */
export async function copyAll(file: ModelFile, places: readonly Placed[], run: Run): Promise<string[]> {
  for (const { location, path } of places) {
    // The model was given as a path or URL, so there is telling where these files lie.
    const source = await file.external!(location);
    if (resolve(source.name) !== resolve(path)) await copyTo(path, source, run);
  }
  return places.map(({ path }) => path);
}

/**
 * The caches of hubs keep all files of a model in one folder and link to them from another: so a file may lie where the model's
 * own file does.
 * @throws SourceError when a file beside the model is a link to elsewhere
 */
async function refuseStraying(model: string, location: string): Promise<void> {
  const path = join(dirname(model), location);
  // What is not there is missed in better words when it is read.
  const real = await realpath(path).catch(() => undefined);
  if (real === undefined) return;
  const folders = [await realpath(dirname(model)), dirname(await realpath(model))];
  if (folders.some((folder) => isInside(folder, real))) return;
  const message = `leads by a link to ${real}, outside the model's folder; put the file itself there`;
  throw new SourceError(message, { file: path });
}

/** @throws SourceError when a path in a folder leads out of it by a link */
async function refuseLeaving(folder: string, path: string): Promise<void> {
  const real = await realpath(folder).catch(() => undefined);
  let there = path;
  while (!existsSync(there) && resolve(there) !== resolve(folder)) there = dirname(there);
  const found = await realpath(there).catch(() => undefined);
  if (real === undefined || found === undefined || isInside(real, found)) return;
  throw new SourceError(`leads by a link to ${found}, outside ${folder}; remove it, or choose another --output`, {
    file: there,
  });
}

function isInside(folder: string, path: string): boolean {
  const way = relative(folder, path);
  return way !== ".." && !way.startsWith(`..${sep}`) && !isAbsolute(way);
}

async function copyTo(path: string, source: ByteSource, run: Run): Promise<void> {
  // A URL's size is known after the first read.
  if (source.byteLength === undefined) await source.read(0, 1);
  if (existsSync(path)) {
    if (await isSame(path, source)) return;
    const message = `already exists and differs from the model's ${source.name}; choose another folder`;
    throw new SourceError(message, { file: path });
  }
  run.folder(dirname(path));
  await writeWhole(path, chunksOf(source), false);
  run.undoing(() => rmSync(path, { force: true }));
}

async function* chunksOf(source: ByteSource): AsyncGenerator<Uint8Array, void> {
  const size = source.byteLength!;
  for (let at = 0; at < size; at += CHUNK_BYTES) yield await source.read(at, Math.min(CHUNK_BYTES, size - at));
}

async function isSame(path: string, source: ByteSource): Promise<boolean> {
  const there = await openSource(path);
  try {
    if (there.byteLength !== source.byteLength) return false;
    let at = 0;
    for await (const chunk of chunksOf(source)) {
      if (Buffer.compare(chunk, await there.read(at, chunk.length)) !== 0) return false;
      at += chunk.length;
    }
    return true;
  } finally {
    await there.close?.();
  }
}
