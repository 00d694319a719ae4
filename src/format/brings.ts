/**
 * What a task brings beside its low-rank terms, as a pack's directory says it (SPEC.md, section 4.3): a list of
 * "role name". Written and read here only.
 */
import type { PackModule, ParameterRole, TaskBlob, TaskTerm } from "./format.ts";

/** What a task may have for a module. */
type ModuleRole = "magnitude" | "private" | "own-A" | "own-B";

/** A parameter that a task changes, or a module for which it has a magnitude, private terms or rows of its own. */
export interface Brought {
  readonly role: ParameterRole | ModuleRole;
  /** Of the parameter ("classifier.weight"), or of the module. */
  readonly name: string;
}

/** Of modules, which have each of these. */
type OfModules = Readonly<Record<ModuleRole, readonly string[]>>;

/** The list as it is stored. @param modules names of modules by what the task has for them */
export function encodeBrings(
  parameters: readonly { readonly role: ParameterRole; readonly name: string }[],
  modules: Partial<OfModules>,
): string[] {
  return [
    ...parameters.map(({ role, name }) => `${role} ${name}`),
    ...Object.entries(modules).flatMap(([role, names]) => names.map((name) => `${role} ${name}`)),
  ];
}

/** What a blob itself says, in the form of the list. */
export function bringsOf({ terms, parameters }: TaskBlob, modules: readonly PackModule[]): string[] {
  const named = (has: (term: TaskTerm) => unknown): string[] =>
    terms.filter(has).map(({ module }) => modules[module]!.name);
  return encodeBrings(parameters, {
    magnitude: named(({ magnitude }) => magnitude),
    private: named(({ privateA }) => privateA),
    "own-A": named(({ ownA }) => ownA),
    "own-B": named(({ ownBt }) => ownBt),
  });
}

/** A role, a space, and a name. */
export const BROUGHT: RegExp = /^(saved|bias(-delta)?|rows|magnitude|private|own-[AB]) ./s;

/** Whether a role is of a module, not of a parameter. */
export function isOfModule(role: Brought["role"]): role is ModuleRole {
  return role === "magnitude" || needsFactors(role);
}

/** Whether it takes factors, which a task without it does not have beside coefficients. */
export function needsFactors(role: Brought["role"]): boolean {
  return role === "private" || role === "own-A" || role === "own-B";
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
