/**
 * Progress of reading files, reported in the shape that `progress_callback` of transformers.js is given. Loaded where
 * somebody asks.
 */
import { described } from "./errors.ts";
import type { ByteSource, ReadOptions } from "./source.ts";

/** Progress of one file. */
export interface FileProgress {
  /**
   * "initiate": it will be read; "download": its bytes are asked for; "progress": some have arrived; "done": no more
   * are needed.
   */
  readonly status: "initiate" | "download" | "progress" | "done";
  /** Kind of the file. */
  readonly stage: "pack" | "model" | "adapter";
  /** Folder of the file, or what its address has in front of its name. */
  readonly name: string;
  /** Name of the file. */
  readonly file: string;
  /** Bytes that have arrived. */
  readonly loaded: number;
  /** Bytes that are needed: of a pack, those of its directory and components. 0 as long as that is unknown. */
  readonly total: number;
  /** `loaded` in percent of `total`. */
  readonly progress: number;
}

/** All is loaded, and the session is made. */
export interface ReadyProgress extends Omit<FileProgress, "status" | "stage"> {
  readonly status: "ready";
  readonly stage: "session";
  /** Empty: the base is active. */
  readonly task: string;
  /** The model's path or address. */
  readonly model: string;
}

/** Argument of `onProgress`. A function for `progress_callback` of transformers.js takes it as well. */
export type Progress = FileProgress | ReadyProgress;

/** Receives the progress of loading. */
export type OnProgress = (progress: Progress) => void;

/** A source that reports its reads. */
export interface WatchedSource extends ByteSource {
  /** Reports the end of reading. */
  done(): void;
}

/**
 * Reports the reads of a source.
 * @param total bytes that are needed, by those that have arrived; undefined as long as that is unknown: nothing is told
 *   meanwhile
 * @throws TypeError when `onProgress` is no function
 */
export function watch(
  source: ByteSource,
  stage: FileProgress["stage"],
  onProgress: OnProgress,
  total: (loaded: number) => number | undefined = (loaded) => Math.max(source.byteLength ?? 0, loaded),
): WatchedSource {
  let loaded = 0;
  let status: FileProgress["status"] = "initiate";
  const tell = teller(source.name, stage, onProgress);
  const enter = (next: FileProgress["status"]): void => {
    status = next;
    tell(status, loaded, total(loaded) ?? 0);
  };
  const add = (count: number): void => {
    loaded += count;
    if (status !== "done" && count > 0 && total(loaded) !== undefined) enter("progress");
  };
  // A file may be needed in part: a runtime reads weights by itself.
  const done = (): void => {
    if (status !== "done") tell((status = "done"), loaded, Math.min(loaded, total(loaded) ?? loaded));
  };
  const reading = async (read: (options: ReadOptions) => Promise<Uint8Array>, options?: ReadOptions) => {
    if (status === "initiate") enter("download");
    let reported = 0;
    const onBytes = (count: number): void => {
      reported += count;
      add(count);
    };
    const bytes = await read({ ...options, onBytes });
    // Sources that report nothing have read all at once.
    add(Math.max(0, bytes.length - reported));
    if (loaded >= (total(loaded) ?? Infinity)) done();
    return bytes;
  };
  enter("initiate");
  const { readAll } = source;
  return {
    name: source.name,
    get byteLength() {
      return source.byteLength;
    },
    folder: source.folder,
    read: (offset, length, options) => reading((how) => source.read(offset, length, how), options),
    ...(readAll && { readAll: (options) => reading((how) => readAll.call(source, how), options) }),
    done,
    async close() {
      done();
      await source.close?.();
    },
  };
}

/**
 * Makes what tells of one file.
 * @param path of the file, or its address
 * @throws TypeError when `onProgress` is no function
 */
export function teller(
  path: string,
  stage: FileProgress["stage"],
  onProgress: OnProgress,
): (status: FileProgress["status"], loaded: number, total: number) => void {
  if (typeof onProgress !== "function")
    throw new TypeError(`onProgress: expected a function, got ${described(onProgress)}`);
  return (status, arrived, total) => {
    const loaded = Math.min(arrived, total);
    const progress = status === "done" ? 100 : total === 0 ? 0 : (100 * loaded) / total;
    onProgress({ status, stage, ...placeOf(path), loaded, total, progress });
  };
}

/** Folder and name of a file by its path or address. */
export function placeOf(path: string): { readonly name: string; readonly file: string } {
  const [file = path] = /[^/\\]+$/.exec(path) ?? [];
  return { name: path.slice(0, -file.length).replace(/[/\\]$/, ""), file };
}
