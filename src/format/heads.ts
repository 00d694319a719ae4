/**
 * Class names held against the head that they are the classes of.
 */

/** A parameter that comes with a task, as far as it matters here. */
interface HeadParameter {
  readonly name: string;
  readonly role: string;
  readonly shape: readonly number[];
}

/** Whether a parameter belongs to a classifier, by the names that transformers and PEFT have for it. */
export function isHead(parameter: string): boolean {
  return /(^|\.)(classifier|score)\./.test(parameter);
}

/**
 * Says how a task's class names differ from its head; undefined where they fit, or where it brings no head that is known
 * as one. One layer of a head has a row for each class.
 */
export function misfitLabels(
  labels: readonly string[] | undefined,
  parameters: readonly HeadParameter[],
): string | undefined {
  const layers = parameters.filter(({ name, role, shape }) => role === "saved" && isHead(name) && shape.length === 2);
  if (!labels || layers.length === 0 || layers.some(({ shape }) => shape[0] === labels.length)) return undefined;
  const found = layers.map(({ name, shape }) => `"${name}" has ${shape[0]} rows`).join(", ");
  return `it has ${labels.length} labels, but ${found}`;
}
