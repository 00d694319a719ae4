/** The command inspect: what is in a pack, as its directory says. */
import { SECTION_FREE, WINDOW_BYTES } from "../format/format.ts";
import { keyName } from "../pack/keys.ts";
import type { Pack } from "../pack/pack.ts";
import { breakEven } from "../pack/report.ts";
import { type Attach, command } from "./command.ts";
import { bytes, percent, sharing, table } from "./output.ts";

export const inspect: Attach = command({
  usage: "inspect <PACK>",
  does: "Show sections, tasks, components, explained variance and break-even.",
  options: {},
  async run([path]: [string], _, run) {
    const pack = await run.pack(path, { bases: "later" });
    const { version, basisId, directory } = pack;
    const { committed, basesLength } = pack.window.superblock;
    const sections = sectionsOf(pack);
    const modules = pack.modules.map(({ name, out, in: inputs, A, B }) => ({
      name,
      out,
      in: inputs,
      componentsA: A?.K ?? 0,
      componentsB: B?.K ?? 0,
      explainedA: A?.explained ?? 0,
      explainedB: B?.explained ?? 0,
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
    const dtypes = pack.modules.flatMap(({ A, B }) => [A?.tensor.dtype, B?.tensor.dtype]);
    const dtype = [...new Set(dtypes)].filter(Boolean).join(",");
    const { signature } = pack.window.superblock;
    const trust = { integrity: await pack.integrity(), signedBy: signature ? keyName(signature.key) : null };
    const about = { version, bytes: committed, mode, gauge, centering, dtype, producer, baseModel, basisId, ...trust };
    return {
      json: { ...about, basisBytes: basesLength, tasks, modules, sections, breakEvenTasks },
      text: [
        `${pack.name}: version ${version}, ${bytes(committed)}, ${mode}, ${gauge}, centring ${centering}, ${dtype}`,
        `root ${trust.integrity}, ${trust.signedBy ? `signed by ${trust.signedBy} (verify checks it)` : "not signed"}`,
        ...table([["section", "offset", "bytes"], ...sections.map(({ name, offset, bytes }) => [name, offset, bytes])]),
        "",
        ...table([
          ["module", "out", "in", "K of A", "K of B", "explained A", "explained B"],
          ...modules.map(({ explainedA, explainedB, ...module }) => [
            ...Object.values(module),
            percent(explainedA),
            percent(explainedB),
          ]),
        ]),
        "",
        `${tasks.length} tasks. ${sharing(breakEvenTasks)}`,
      ],
    };
  },
});

/** In the order of the file. */
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
