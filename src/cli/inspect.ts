/** The command inspect: what is in a pack, as its directory says. */

import type { Pack } from "../core/pack.ts";
import { keyName } from "../core/trust.ts";
import { FormatError } from "../errors.ts";
import { needsFactors, parseBrought, SECTION_FREE, type Side, WINDOW_BYTES } from "../format/format.ts";
import { breakEven } from "../pack/report.ts";
import { DTYPES } from "../tensor/dtypes.ts";
import { type Attach, command } from "./command.ts";
import { bytes, count, percent, range, sharing, sum, table } from "./output.ts";

export const inspect: Attach = command({
  usage: "inspect <PACK>",
  example: "inspect tasks.eigen",
  options: {},
  reads: ["file"],
  async run([path]: [string], _, run) {
    const pack = await run.pack(path, { bases: "later", maxResidentBytes: 0 });
    const { version, basisId, directory } = pack;
    const { committed, basesLength } = pack.window.superblock;
    const sections = sectionsOf(pack);
    const modules = pack.modules.map(({ name, out, in: inputs, A, B }) => ({
      name,
      out,
      in: inputs,
      componentsA: sum(A.map(({ K }) => K)),
      componentsB: sum(B.map(({ K }) => K)),
      explainedA: meanExplained(A),
      explainedB: meanExplained(B),
    }));
    const tasks = directory.tasks.map(({ id, section: { length, integrity = null }, metadata }) => ({
      id,
      bytes: length,
      integrity,
      metadata,
    }));
    const breakEvenTasks = breakEven(
      committed,
      tasks.map((task) => task.bytes),
      directory.tasks.map((task) => task.adapterBytes),
    );
    const { mode, gauge, centering, producer, baseModel = null } = directory.basis;
    const dtypes = pack.modules.flatMap(({ A, B }) => [...A, ...B].map(({ tensor }) => tensor.dtype));
    const dtype = [...new Set(dtypes)].join(",");
    const shares = modules.some(({ componentsA, componentsB }) => componentsA > 0 || componentsB > 0);
    const { step = null, error = null } = directory.basis;
    const coding = step === null ? "" : ", entropy-coded";
    const limit = error === null ? "" : `, every task made within ${percent(error)} of its ΔW`;
    const kind = shares ? `${mode}, ${gauge}, centring ${centering}, ${dtype}` : `${gauge}, no shared components`;
    const privateTerms = await privateTermsOf(pack);
    const { signature } = pack.window.superblock;
    const trust = { integrity: await pack.integrity(), signedBy: signature ? keyName(signature.key) : null };
    const made = { mode, gauge, centering, dtype, step, error, producer, baseModel };
    const about = { version, bytes: committed, ...made, basisId, ...trust };
    return {
      json: { ...about, basisBytes: basesLength, tasks, modules, sections, privateTerms, breakEvenTasks },
      text: [
        `${pack.name}: version ${version}, ${bytes(committed)}, ${kind}${coding}${limit}`,
        `root ${trust.integrity}, ${trust.signedBy ? `signed by ${trust.signedBy} (verify checks it)` : "not signed"}`,
        ...table([["section", "offset", "bytes"], ...sections.map(({ name, offset, bytes }) => [name, offset, bytes])]),
        "",
        ...modulesTable(modules, shares),
        "",
        [`${count(tasks.length, "task")}.`, ...(shares ? [sharing(breakEvenTasks)] : [])].join(" "),
        ...sidesText(modules),
        ...privateText(privateTerms),
      ],
    };
  },
});

interface Module {
  readonly name: string;
  readonly out: number;
  readonly in: number;
  readonly componentsA: number;
  readonly componentsB: number;
  readonly explainedA: number;
  readonly explainedB: number;
}

/** @param shares whether there are components to describe */
function modulesTable(modules: readonly Module[], shares: boolean): string[] {
  if (!shares)
    return table([["module", "out", "in"], ...modules.map(({ name, out, in: inputs }) => [name, out, inputs])]);
  const explained = (K: number, share: number): string => (K > 0 ? percent(share) : "");
  return table([
    ["module", "out", "in", "K of A", "K of B", "explained A", "explained B"],
    ...modules.map(({ explainedA, explainedB, ...module }) => [
      ...Object.values(module),
      explained(module.componentsA, explainedA),
      explained(module.componentsB, explainedB),
    ]),
  ]);
}

/** What tasks share where they do not share both sides of all modules. */
function sidesText(modules: readonly Module[]): string[] {
  const [A, B] = (["componentsA", "componentsB"] as const).map((of) => modules.filter((one) => one[of] > 0).length);
  if (A === B && (A === 0 || A === modules.length)) return [];
  const of = `of ${count(modules.length, "module")}`;
  return [`Tasks share what layers read (A) in ${A} ${of}, and what they write (B) in ${B}.`];
}

/** Terms that tasks have to themselves: how many in a module, and in which number formats. */
interface PrivateTerms {
  readonly min: number;
  readonly max: number;
  readonly dtypes: readonly string[];
  /** Tasks whose blobs could not be read; `verify` says why. */
  readonly unread: number;
}

/** How much of the energy the components of a side keep, over its bases; 0 where it has none. */
function meanExplained(bases: readonly Side[]): number {
  return sum(bases.map(({ explained }) => explained)) / Math.max(bases.length, 1);
}

/** The one figure that the directory lacks: read from the blobs of tasks that have rows of their own. Null where none has. */
async function privateTermsOf(pack: Pack): Promise<PrivateTerms | null> {
  const owners = [...pack.tasks.values()].filter(
    ({ brings }) => brings?.some((entry) => needsFactors(parseBrought(entry).role)) ?? true,
  );
  const ranks: number[] = [];
  const dtypes = new Set<string>();
  let unread = 0;
  for (const { id } of owners) {
    try {
      for (const { rank, ownA, ownBt, privateRank, privateA } of (await pack.load(id)).terms) {
        const own = [ownA, ownBt, privateA].flatMap((tensor) => tensor ?? []);
        if (own.length === 0) continue;
        ranks.push(privateRank + (ownA || ownBt ? rank : 0));
        for (const { dtype } of own) dtypes.add(dtype);
      }
    } catch (error) {
      if (!(error instanceof FormatError)) throw error;
      unread++;
    }
  }
  if (ranks.length === 0) return null;
  const [min, max] = [ranks.reduce((a, b) => Math.min(a, b)), ranks.reduce((a, b) => Math.max(a, b))];
  return { min, max, dtypes: DTYPES.filter((dtype) => dtypes.has(dtype)), unread };
}

function privateText(own: PrivateTerms | null): string[] {
  if (!own) return [];
  const { min, max, dtypes, unread } = own;
  const damaged = unread > 0 ? `; ${count(unread, "task")} could not be read, verify says why` : "";
  return [`Tasks have rows of their own: ${range(min, max)} in a module, in ${dtypes.join(", ")}${damaged}.`];
}

/** Lists sections in the order of the file. */
function sectionsOf({ directory, window }: Pack): { name: string; offset: number; bytes: number }[] {
  const { directoryOffset, directoryLength, basesOffset, basesLength } = window.superblock;
  const free = directory.sections.filter(({ kind }) => kind === SECTION_FREE);
  return [
    { name: "window", offset: 0, bytes: WINDOW_BYTES },
    { name: "directory", offset: directoryOffset, bytes: directoryLength },
    { name: "bases", offset: basesOffset, bytes: basesLength },
    ...directory.tasks.map(({ id, section }) => ({
      name: `task ${id}`,
      offset: section.offset,
      bytes: section.length,
    })),
    ...free.map(({ offset, length }) => ({ name: "free", offset, bytes: length })),
  ].sort((a, b) => a.offset - b.offset);
}
