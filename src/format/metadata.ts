/**
 * What is known about a task beside its numbers (SPEC.md, section 4.3), checked.
 */
import type { Value } from "./messagepack.ts";

/** @throws FormatError naming the field that is not what it must be */
export function parseMetadata(value: Value): Record<string, unknown> {
  const metadata = value.plain();
  for (const key of Object.keys(metadata)) {
    const field: Value = value.get(key);
    // Nil is as good as nothing, here as everywhere in a map.
    if (field.absent) continue;
    if (key === "license" || key === "origin") field.string(4096);
    if (key !== "labels") continue;
    const labels = field.array(65_536).map((label) => label.string(1024));
    field.check(labels.length > 0, () => "no names, expected 1 to 65536");
  }
  return metadata;
}
