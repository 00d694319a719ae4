/**
 * Reads `task.json`, the file beside an adapter with facts that tensors do not tell: class names, licence, origin. All its plain values
 * become the task's metadata. It is not the adapter's own configuration.
 */
import { AdapterError } from "../errors.ts";
import type { TaskMetadata } from "../format/format.ts";
import { show } from "../tensor/tensor-file.ts";

/** Metadata is read with a pack's directory, before any task: it must stay small. */
const MAX_METADATA_BYTES = 64 * 1024;

/** Levels left in a pack (SPEC.md, section 1): 16, less three for the task list, its entries and their metadata. */
const MAX_DEPTH = 13;
/** Most bytes of a class name, and of licence and origin (SPEC.md, section 4.3). */
const [MAX_LABEL_BYTES, MAX_TEXT_BYTES] = [1024, 4096];

/**
 * Checks the contents of a task.json.
 * @param task parsed JSON; undefined when there is no such file
 * @param file its path, for messages
 * @throws AdapterError naming the invalid field
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
  const bytes = bytesOf(JSON.stringify(task));
  if (bytes > MAX_METADATA_BYTES) {
    throw new AdapterError(`has ${bytes} bytes, ${MAX_METADATA_BYTES} at most are kept; shorten it`, { file });
  }
  const { labels, license, origin } = task as Record<string, unknown>;
  const isLabel = (label: unknown): boolean => isText(label, MAX_LABEL_BYTES);
  if (labels !== undefined && !(Array.isArray(labels) && labels.length > 0 && labels.every(isLabel))) {
    throw refuse(
      "labels",
      `is ${show(labels)}, expected an array of strings of 1 to ${MAX_LABEL_BYTES} bytes: the class names in the order of the head's rows`,
    );
  }
  for (const [field, text] of Object.entries({ license, origin })) {
    if (text === undefined || isText(text, MAX_TEXT_BYTES)) continue;
    throw refuse(field, `is ${show(text)}, expected a string of 1 to ${MAX_TEXT_BYTES} bytes; correct or remove it`);
  }
  return { ...task };
}

const bytesOf = (text: string): number => new TextEncoder().encode(text).length;

function isText(value: unknown, maxBytes: number): boolean {
  return typeof value === "string" && value !== "" && bytesOf(value) <= maxBytes;
}

function isPlain(value: unknown, depth: number): boolean {
  if (value === null || typeof value === "string" || typeof value === "boolean") return true;
  if (typeof value === "number") return Number.isFinite(value);
  return typeof value === "object" && depth > 0 && Object.values(value).every((item) => isPlain(item, depth - 1));
}
