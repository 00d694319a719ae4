/** Which of several files of one model each module of a pack lives in. */

import type { Pack } from "../core/pack.ts";
import { partOf } from "../core/part.ts";
import { BaseMismatchError } from "../errors.ts";
import { isOfModule, moduleOf } from "../format/format.ts";
import type { ModelFile } from "../onnx/read.ts";
import { type MatchOptions, ModelMatcher } from "./match.ts";
import { broughtBy, type PlanOptions } from "./plan.ts";

/** What of a pack is looked for in a file, and how. */
export type ResidentOptions = MatchOptions & Pick<PlanOptions, "modules">;

/** What of a pack files lack, and why, by file; undefined once it lives in one. */
export type Lacking = Map<string, Map<string, string> | undefined>;

/** The filter for what lives in a file, undefined where nothing does and that is no error. Notes what does not live there. */
export async function residentsOf(
  file: ModelFile,
  name: string,
  pack: Pack,
  options: ResidentOptions,
  lacking: Lacking,
  empty: "refuse" | "skip",
): Promise<((module: string) => boolean) | undefined> {
  const { modules: wanted } = options;
  const view = wanted ? partOf(pack, wanted) : pack;
  const bases = await pack.bases(options);
  try {
    const matcher = new ModelMatcher(file, options);
    const brought = (await broughtBy(view, options)).filter(({ role }) => !isOfModule(role));
    const parameters = new Set(brought.map((one) => one.name).filter((one) => !matcher.ignores(one)));
    const residents = await matcher.residents(view.modules, parameters, bases.bytes);
    const [here, elsewhere] = [new Set<string>(), new Set<string>()];
    for (const [one, why] of residents) {
      const module = parameters.has(one) ? moduleOf(one) : one;
      (why === undefined ? here : elsewhere).add(module);
      if (why === undefined) lacking.set(one, undefined);
      else if (lacking.has(one)) lacking.get(one)?.set(name, why);
      else lacking.set(one, new Map([[name, why]]));
    }
    if (view.modules.some((module) => here.has(module.name))) return filterOf(here, elsewhere, wanted);
    // A file that has only a head is none to skip: the head would be lost.
    if (here.size === 0 && empty === "skip") return undefined;
    const [first] = view.modules;
    const why = first && `; "${first.name}": ${residents.get(first.name)}`;
    const only = here.size > 0 ? `, only "${[...here].join('", "')}", which the option \`ignore\` leaves out` : "";
    const message = `${name}: no module of ${pack.name} lives in this file${only}${why}. Run it by itself, without the pack`;
    throw new BaseMismatchError(message, { module: first?.name ?? "" });
  } finally {
    bases.close();
  }
}

/**
 * The filter that a session keeps. Made here, since a closure of `residentsOf` would keep the model's bytes with it. What a task brings
 * that is added later is not known to live elsewhere: the session says that it is not prepared for it.
 */
function filterOf(
  here: ReadonlySet<string>,
  elsewhere: ReadonlySet<string>,
  wanted: ResidentOptions["modules"],
): (module: string) => boolean {
  return (module) => here.has(module) || !(elsewhere.has(module) || wanted?.(module) === false);
}

/** @throws BaseMismatchError for what lives in none of the files whose options ask for it */
export function refuseHomeless(lacking: Lacking, empty: "refuse" | "skip"): void {
  for (const [name, reasons] of lacking) {
    if (!reasons) continue;
    const whys = [...reasons].map(([file, why]) => `${file}: ${why}`).join("; ");
    const [places, advice] =
      empty === "skip"
        ? ["sessions", "Use the model that the adapters are for"]
        : ["files", "Give the file that has it"];
    const message = `"${name}" lives in none of the ${places} (${whys}). ${advice}, or leave it out with the option \`modules\``;
    throw new BaseMismatchError(message, { module: name });
  }
}
