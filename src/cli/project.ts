/**
 * Commands for packs too large for one machine: project and assemble, from a basis to a pack (docs/hub.md). Like shard and merge
 * they give the same bytes for the same input.
 */
import { completeDtypes } from "../pack/report.ts";
import { assemblePack, openTasks, projectTasks } from "../pack/shard/tasks.ts";
import { type Attach, command } from "./command.ts";
import { refuseOverwriting, writeWhole } from "./files.ts";
import { as, dtype, output } from "./options.ts";
import { bytes, counting, lossTable, percent, resources, sharing, warnOf } from "./output.ts";
import { contents, digest, makePart, part } from "./parts.ts";

export const project: Attach = command({
  usage: "project <BASIS> <ADAPTER_OR_FOLDER...>",
  does: "Make tasks of some adapters, on a basis that others hold too.",
  options: { output: part, dtype, as },
  async run([basisPath, ...paths]: [string, ...string[]], { output: file, dtype, as }, run, out) {
    refuseOverwriting(file, basisPath);
    const types = completeDtypes(dtype);
    const adapters = await run.adapters(paths, as);
    const basis = await run.pack(basisPath);
    const made = digest("project", basis.basisId, types.coefficients, types.head, await contents(adapters));
    const onProgress = counting(out, "module");
    const figures = { adapters: adapters.length, modules: basis.modules.length, warnings: warnOf(adapters, out) };
    const { json, text } = await makePart(file, "tasks", made, figures, async () => {
      return (await projectTasks(basis, adapters, made, { dtype: types, onProgress })).chunks;
    });
    const { tasks } = run.closing(await openTasks(file));
    return { json: { ...json, residual: tasks }, text: [...text, ...lossTable(tasks)] };
  },
});

export const assemble: Attach = command({
  usage: "assemble <BASIS> <PART...>",
  does: "Make a pack of the tasks of all parts, sorted by id.",
  options: { output: output("PACK", "The pack to write.") },
  async run([basisPath, ...paths]: [string, ...string[]], { output: file }, run) {
    refuseOverwriting(file, basisPath, ...paths);
    await run.writable(file);
    const basis = await run.pack(basisPath);
    const parts = [];
    for (const path of paths) parts.push(run.closing(await openTasks(path)));
    const { chunks, report } = await assemblePack(basis, parts);
    await run.lock(file);
    await writeWhole(file, chunks);
    const { dtype, ...rest } = report;
    const { tasks, modules, ratio, error, breakEvenTasks } = rest;
    const { mean, max, worstTask } = error;
    return {
      json: { file, ...dtype, ...rest, ...resources() },
      text: [
        `${file}: ${tasks} tasks, ${modules} modules, ${bytes(rest.bytes)} (${ratio.toFixed(1)}× smaller than the adapters)`,
        `ΔW error: mean ${percent(mean)}, largest ${percent(max)} (${worstTask})`,
        sharing(breakEvenTasks),
      ],
    };
  },
});
