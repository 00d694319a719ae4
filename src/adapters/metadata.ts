/**
 * `task.json`, the file beside an adapter that says what cannot be read from tensors: class names, licence, origin.
 * Whatever plain values it holds become the task's metadata. Not the adapter's own configuration.
 */
import { AdapterError } from "../errors.ts";
import type { TaskMetadata } from "../format/format.ts";

/** Metadata is read with a pack's directory, before any task: it must stay small. */
const MAX_METADATA_BYTES = 64 * 1024;

/** Deeper nesting is an attack on recursive decoders, not a description. */
const MAX_DEPTH = 16;

/**
 * Checks the contents of a task.json.
 * @param task parsed JSON; undefined when there is no such file
 * @param file its path, for messages
 * @throws AdapterError naming the field that is not what it must be
 */
export function readTaskMetadata(task: unknown, file: string): TaskMetadata {
  if (task === undefined) return {};
  const refuse = (field: string, message: string): AdapterError =>
    new AdapterError(`${field} ${message}`, { file, field });
  if (typeof task !== "object" || task === null || Array.isArray(task)) {
    throw new AdapterError(`is not a JSON object; write {"labels": [...]} or remove it`, { file });
  }
  for (const [field, value] of Object.entries(task)) {
    if (!isPlain(value, MAX_DEPTH)) {
      throw refuse(field, `is not plain JSON with finite numbers, nested ${MAX_DEPTH} deep at most; simplify it`);
    }
  }
  const bytes = new TextEncoder().encode(JSON.stringify(task)).length;
  if (bytes > MAX_METADATA_BYTES) {
    throw new AdapterError(`has ${bytes} bytes, ${MAX_METADATA_BYTES} at most are kept; shorten it`, { file });
  }
  const { labels, license, origin } = task as Record<string, unknown>;
  if (labels !== undefined && !(Array.isArray(labels) && labels.every((label) => typeof label === "string"))) {
    throw refuse("labels", "is not an array of strings; list the class names in the order of the head's rows");
  }
  if (license !== undefined && typeof license !== "string") throw refuse("license", "is not a string");
  if (origin !== undefined && typeof origin !== "string") throw refuse("origin", "is not a string");
  return { ...task };
}

function isPlain(value: unknown, depth: number): boolean {
  if (value === null || typeof value === "string" || typeof value === "boolean") return true;
  if (typeof value === "number") return Number.isFinite(value);
  return typeof value === "object" && depth > 0 && Object.values(value).every((item) => isPlain(item, depth - 1));
}
