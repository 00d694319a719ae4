/** The command inspect: the content of a pack, as its directory lists it. Reads no task. */
import type { Pack } from "../core/pack.ts";
import { keyName } from "../core/trust.ts";
import { SECTION_FREE, type Side, WINDOW_BYTES } from "../format/format.ts";
import { breakEven } from "../pack/report.ts";
import { mean, sum } from "../tensor/dtypes.ts";
import { type Attach, command } from "./command.ts";
import { bytes, count, percent, sharing, table } from "./output.ts";

export const inspect: Attach = command({
  usage: "inspect <PACK>",
  example: "inspect tasks.eigen",
  options: {},
  reads: ["file"],
  async run([path]: [string], _, run) {
    const pack = await run.pack(path, { bases: "later", maxResidentBytes: 0 });
    const { version, basisId, directory, window } = pack;
    const { committed, basesLength, signature } = window.superblock;
    const components = (bases: readonly Side[]): number => sum(bases.map(({ K }) => K));
    const explained = (bases: readonly Side[]): number => mean(bases.map(({ explained }) => explained));
    const modules = pack.modules.map(({ name, out, in: inputs, A, B }) => {
      const counts = { componentsA: components(A), componentsB: components(B) };
      return { name, out, in: inputs, ...counts, explainedA: explained(A), explainedB: explained(B) };
    });
    const tasks = directory.tasks.map(({ id, section: { length, integrity = null }, metadata }) => {
      return { id, bytes: length, integrity, metadata };
    });
    const breakEvenTasks = breakEven(
      committed,
      tasks.map((task) => task.bytes),
      directory.tasks.map(({ adapterBytes }) => adapterBytes),
    );
    const { mode, gauge, centering, producer, step = null, error = null, baseModel = null } = directory.basis;
    const dtypes = pack.modules.flatMap(({ A, B }) => [...A, ...B].map(({ tensor }) => tensor.dtype));
    const dtype = [...new Set(dtypes)].join(",");
    const shares = modules.some(({ componentsA, componentsB }) => componentsA > 0 || componentsB > 0);
    const kind = shares ? `shared components in ${dtype}` : "no shared components";
    const coding = step === null ? "" : ", entropy-coded";
    const limit = error === null ? "" : `, every task made within ${percent(error)} of its ΔW`;
    const integrity = await pack.integrity();
    const signedBy = signature ? keyName(signature.key) : null;
    const basis = { mode, gauge, centering, dtype, step, error, producer, baseModel, basisId, basisBytes: basesLength };
    const sections = sectionsOf(pack);
    const share = (K: number, explained: number): string => (K > 0 ? percent(explained) : "");
    return {
      json: { version, bytes: committed, ...basis, integrity, signedBy, tasks, modules, sections, breakEvenTasks },
      text: [
        `${pack.name}: version ${version}, ${count(tasks.length, "task")}, ${bytes(committed)}, ${kind}${coding}${limit}`,
        `root ${integrity}, ${signedBy ? `signed by ${signedBy} (verify checks it)` : "not signed"}`,
        ...table([["section", "offset", "bytes"], ...sections.map(({ name, offset, bytes }) => [name, offset, bytes])]),
        "",
        ...table([
          ["module", "out", "in", ...(shares ? ["K of A", "K of B", "explained A", "explained B"] : [])],
          ...modules.map(({ name, out, in: inputs, componentsA: a, componentsB: b, explainedA, explainedB }) => [
            ...[name, out, inputs],
            ...(shares ? [a, b, share(a, explainedA), share(b, explainedB)] : []),
          ]),
        ]),
        "",
        [`${count(tasks.length, "task")}.`, ...(shares && tasks.length > 0 ? [sharing(breakEvenTasks)] : [])].join(" "),
      ],
    };
  },
});

function sectionsOf({ directory, window }: Pack): { name: string; offset: number; bytes: number }[] {
  const { directoryOffset, directoryLength, basesOffset, basesLength } = window.superblock;
  const free = directory.sections.filter(({ kind }) => kind === SECTION_FREE);
  return [
    { name: "window", offset: 0, bytes: WINDOW_BYTES },
    { name: "directory", offset: directoryOffset, bytes: directoryLength },
    { name: "bases", offset: basesOffset, bytes: basesLength },
    ...directory.tasks.map(({ id, section: { offset, length } }) => ({ name: `task ${id}`, offset, bytes: length })),
    ...free.map(({ offset, length }) => ({ name: "free", offset, bytes: length })),
  ].sort((a, b) => a.offset - b.offset);
}
