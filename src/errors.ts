/**
 * The errors this package throws: one abstract parent, six kinds. Each is told by its `tag`, so that a check works
 * across bundles and realms where `instanceof` does not. A wrong argument is a plain `TypeError` or `RangeError`.
 */

/** Parent of every error thrown on purpose. `cause` holds what was caught, if anything. */
export abstract class EigenLoraError extends Error {
  /** Which of the six kinds this is. */
  abstract readonly tag: "adapter" | "format" | "source" | "base" | "task" | "backend";

  /** The typed fields of the error without `message`, as the command line prints them with `--json`. */
  toJSON(): Record<string, unknown> {
    return { ...(this as object), tag: this.tag, message: this.message };
  }
}

/** An adapter cannot be represented as a canonical adapter. Fix the file named, or convert it as the message says. */
export class AdapterError extends EigenLoraError {
  readonly tag = "adapter";
  /** Path or name of the offending file. */
  readonly file: string;
  /** The tensor or configuration field at fault, where there is one. */
  readonly field?: string;

  constructor(message: string, at: { file: string; field?: string; cause?: unknown }) {
    super(`${at.file}: ${message}`, at.cause === undefined ? undefined : { cause: at.cause });
    this.file = at.file;
    if (at.field !== undefined) this.field = at.field;
  }
}

/** Bytes are not what their format says: truncated, damaged, lying or of an unknown version. Fetch or pack again. */
export class FormatError extends EigenLoraError {
  readonly tag = "format";
  /** Name of the source that was read. */
  readonly file: string;
  /** The part of the file at fault: "window", "directory", "bases", "task sst2", … */
  readonly part: string;

  constructor(message: string, at: { file: string; part: string; cause?: unknown }) {
    super(`${at.file}, ${at.part}: ${message}`, at.cause === undefined ? undefined : { cause: at.cause });
    this.file = at.file;
    this.part = at.part;
  }
}

/** Bytes could not be read: network, disk, a server that ignores ranges, a file that changed. Usually worth a retry. */
export class SourceError extends EigenLoraError {
  readonly tag = "source";
  /** Name of the source: path or URL. */
  readonly file: string;
  /** HTTP status, where the source is a URL that answered. */
  readonly status?: number;

  constructor(message: string, at: { file: string; status?: number; cause?: unknown }) {
    super(`${at.file}: ${message}`, at.cause === undefined ? undefined : { cause: at.cause });
    this.file = at.file;
    if (at.status !== undefined) this.status = at.status;
  }
}

/** Pack and base model do not belong together: a module is missing, ambiguous, of another shape or of another model. */
export class BaseMismatchError extends EigenLoraError {
  readonly tag = "base";
  /** The adapted module at fault. */
  readonly module: string;
  readonly expected?: unknown;
  readonly found?: unknown;
  /** Nearest names in the base, where the name was at fault. */
  readonly candidates?: readonly string[];

  constructor(
    message: string,
    at: { module: string; expected?: unknown; found?: unknown; candidates?: readonly string[] },
  ) {
    super(message);
    this.module = at.module;
    if (at.expected !== undefined) this.expected = at.expected;
    if (at.found !== undefined) this.found = at.found;
    if (at.candidates !== undefined) this.candidates = at.candidates;
  }
}

/** A task cannot be used as asked: unknown id, duplicate id, a blend its kind does not allow. The active task stays. */
export class TaskError extends EigenLoraError {
  readonly tag = "task";
  readonly task: string;
  /** Ids of the tasks most like the one asked for, nearest first. */
  readonly nearest?: readonly string[];

  constructor(message: string, at: { task: string; nearest?: readonly string[]; cause?: unknown }) {
    super(message, at.cause === undefined ? undefined : { cause: at.cause });
    this.task = at.task;
    if (at.nearest !== undefined) this.nearest = at.nearest;
  }
}

/** No backend could start, or the one in use failed. `reasons` says what each one tried said. */
export class BackendError extends EigenLoraError {
  readonly tag = "backend";
  readonly backend: string;
  readonly reasons: readonly string[];

  constructor(message: string, at: { backend: string; reasons?: readonly string[]; cause?: unknown }) {
    super(message, at.cause === undefined ? undefined : { cause: at.cause });
    this.backend = at.backend;
    this.reasons = at.reasons ?? [];
  }
}
