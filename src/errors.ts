/**
 * The errors this package throws: one abstract parent, seven kinds. Each is told by its `tag`, so that a check works
 * across bundles and realms where `instanceof` does not. A wrong argument is a plain `TypeError` or `RangeError`.
 */

/**
 * Parent of every error thrown on purpose. `cause` holds what was caught, if anything. `At` are its fields; a file, and the part of it, stand in
 * front of the message.
 */
export abstract class EigenLoraError<At extends object = object> extends Error {
  /** Which of the seven kinds this is. */
  abstract readonly tag: "adapter" | "format" | "trust" | "source" | "base" | "task" | "backend";

  constructor(message: string, at: At & { cause?: unknown }) {
    const { cause, ...fields } = at as { file?: string; part?: string; cause?: unknown };
    const place = fields.part === undefined ? fields.file : `${fields.file}, ${fields.part}`;
    super(place === undefined ? message : `${place}: ${message}`, cause === undefined ? undefined : { cause });
    // Fields are declared by the subclasses, not defined: a definition would overwrite what is assigned here.
    for (const [name, value] of Object.entries(fields)) if (value !== undefined) Object.assign(this, { [name]: value });
  }
}

/** An adapter cannot be represented as a canonical adapter. Fix the file named, or convert it as the message says. */
export class AdapterError extends EigenLoraError<{ file: string; field?: string }> {
  readonly tag = "adapter";
  override get name(): string {
    return "AdapterError";
  }
  /** Path or name of the offending file. */
  declare readonly file: string;
  /** The tensor or configuration field at fault, where there is one. */
  declare readonly field?: string;
}

/** Bytes are not what their format says: truncated, damaged, lying or of an unknown version. Fetch or pack again. */
export class FormatError extends EigenLoraError<{ file: string; part: string }> {
  readonly tag = "format";
  override get name(): string {
    return "FormatError";
  }
  /** Name of the source that was read. */
  declare readonly file: string;
  /** The part of the file at fault: "window", "directory", "bases", "task sst2", … */
  declare readonly part: string;
}

/** A pack or task file is not what the caller trusts: another hash, not signed, signed by a stranger, revoked. Do not use it. */
export class TrustError extends EigenLoraError<{ file: string }> {
  readonly tag = "trust";
  override get name(): string {
    return "TrustError";
  }
  /** Path or URL of the file. */
  declare readonly file: string;
}

/** Bytes could not be read: network, disk, a server that misbehaves, a file that changed. `transient` says if a retry may help. */
export class SourceError extends EigenLoraError<{
  file: string;
  status?: number;
  transient?: boolean;
  retryAfter?: number;
}> {
  readonly tag = "source";
  override get name(): string {
    return "SourceError";
  }
  /** Name of the source: path, or URL without its query. */
  declare readonly file: string;
  /** HTTP status, where the source is a URL that answered. */
  declare readonly status?: number;
  /** True when the same may work later: a network fault, a busy server. It was tried again already. */
  declare readonly transient?: boolean;
  /** Milliseconds after which the server wants to be asked again. */
  declare readonly retryAfter?: number;
}

/** Pack and base model do not belong together: a module is missing, ambiguous, of another shape or of another model. */
export class BaseMismatchError extends EigenLoraError<{
  module: string;
  expected?: unknown;
  found?: unknown;
  candidates?: readonly string[];
}> {
  readonly tag = "base";
  override get name(): string {
    return "BaseMismatchError";
  }
  /** The adapted module at fault. */
  declare readonly module: string;
  declare readonly expected?: unknown;
  declare readonly found?: unknown;
  /** Nearest names in the base, where the name was at fault. */
  declare readonly candidates?: readonly string[];
}

/** A task cannot be used as asked: unknown id, duplicate id, a blend its kind does not allow. The active task stays. */
export class TaskError extends EigenLoraError<{ task: string; nearest?: readonly string[]; loss?: number }> {
  readonly tag = "task";
  override get name(): string {
    return "TaskError";
  }
  declare readonly task: string;
  /** Ids of the tasks most like the one asked for, nearest first. */
  declare readonly nearest?: readonly string[];
  /** The share of its ΔW that the task would lose, where that is too much. */
  declare readonly loss?: number;
}

/** No backend could start, or the one in use failed. `reasons` says what each one tried said. */
export class BackendError extends EigenLoraError<{ backend: string; reasons?: readonly string[] }> {
  readonly tag = "backend";
  override get name(): string {
    return "BackendError";
  }
  declare readonly backend: string;
  declare readonly reasons: readonly string[];

  constructor(message: string, at: { backend: string; reasons?: readonly string[]; cause?: unknown }) {
    super(message, { reasons: [], ...at });
  }
}
