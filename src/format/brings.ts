/**
 * What a task brings beside its low-rank terms, as a pack's directory says it (SPEC.md, section 4.3): a list of
 * "role name". Written and read here only.
 */
import type { PackModule, ParameterRole, TaskBlob } from "./format.ts";

/** A parameter that a task changes, or a module of which it has a magnitude or private terms. */
export interface Brought {
  readonly role: ParameterRole | "magnitude" | "private";
  /** Of the parameter ("classifier.weight"), or of the module. */
  readonly name: string;
}

/**
 * The list as it is stored.
 * @param magnitudes names of modules with a DoRA magnitude
 * @param privates names of modules with private terms
 */
export function encodeBrings(
  parameters: readonly { readonly role: ParameterRole; readonly name: string }[],
  magnitudes: readonly string[],
  privates: readonly string[],
): string[] {
  return [
    ...parameters.map(({ role, name }) => `${role} ${name}`),
    ...magnitudes.map((name) => `magnitude ${name}`),
    ...privates.map((name) => `private ${name}`),
  ];
}

/** What a blob itself says, in the form of the list. */
export function bringsOf({ terms, parameters }: TaskBlob, modules: readonly PackModule[]): string[] {
  const named = (which: TaskBlob["terms"]): string[] => which.map(({ module }) => modules[module]!.name);
  const magnitudes = terms.filter((term) => term.magnitude);
  return encodeBrings(parameters, named(magnitudes), named(terms.filter((term) => term.privateRank > 0)));
}

/** "classifier" of "classifier.weight". */
export function moduleOf(parameter: string): string {
  return parameter.replace(/\.[^.]*$/, "");
}

/** One entry of the list. */
export function parseBrought(entry: string): Brought {
  const cut = entry.indexOf(" ");
  return { role: entry.slice(0, cut) as Brought["role"], name: entry.slice(cut + 1) };
}
