/**
 * Commands for packs too large for one machine: project and assemble, from a basis to a pack (docs/hub.md). Like shard and merge
 * they give the same bytes for the same input.
 */
import { completeDtypes } from "../pack/recipe.ts";
import { assemblePack, openTasks, projectTasks } from "../pack/shard/tasks.ts";
import { type Attach, command } from "./command.ts";

import { anyBase, as, dtype, force, output, readFor } from "./options.ts";
import { bytes, count, counting, lossTable, percent, resources, sharing, smaller, warnOf } from "./output.ts";
import { contents, digest, facts, makePart, part } from "./parts.ts";

import { checkTarget, filesOf } from "./target.ts";
import { refuseOtherBase } from "./tasks.ts";

export const project: Attach = command({
  usage: "project <BASIS> <ADAPTER_OR_FOLDER...>",
  does: "Turn some adapters into tasks on a basis from merge.",
  details: "The result is a part with tasks; assemble makes a pack of all parts.",
  options: { output: part, force, dtype, as, anyBase, base: readFor },
  async run([basisPath, ...paths]: [string, ...string[]], { output: file, force, dtype, as, anyBase, base }, run, out) {
    checkTarget(file, { force: true, inputs: [basisPath] });
    const types = completeDtypes(dtype);
    const adapters = await run.adapters(paths, as, base);
    checkTarget(file, { force: true, inputs: adapters.flatMap(filesOf) });
    const basis = await run.pack(basisPath);
    refuseOtherBase(basis, adapters, anyBase);
    const made = digest(
      "project",
      basis.basisId,
      types.coefficients,
      types.head,
      await facts(base),
      await contents(adapters, out),
    );
    const onProgress = counting(out, "module");
    const figures = { adapters: adapters.length, modules: basis.modules.length, warnings: warnOf(adapters, out) };
    const { json, text } = await makePart({ file, force, kind: "tasks", made }, figures, async () => {
      return (await projectTasks(basis, adapters, made, { dtype: types, onProgress })).chunks;
    });
    const { tasks } = run.closing(await openTasks(file));
    return { json: { ...json, residual: tasks }, text: [...text, ...lossTable(tasks)] };
  },
});

export const assemble: Attach = command({
  usage: "assemble <BASIS> <PART...>",
  does: "Make one pack of the tasks in all parts, sorted by id.",
  options: { output: output("PACK", "The pack to write."), force },
  async run([basisPath, ...paths]: [string, ...string[]], { output: file, force }, run) {
    const target = await run.target(file, { force, inputs: [basisPath, ...paths] });
    const basis = await run.pack(basisPath);
    const parts = [];
    for (const path of paths) parts.push(run.closing(await openTasks(path)));
    const { chunks, report } = await assemblePack(basis, parts);
    await target.write(chunks);
    const { dtype, ...rest } = report;
    const { tasks, modules, ratio, error, breakEvenTasks, adapterBytes } = rest;
    const { mean, max, worstTask } = error;
    return {
      json: { file, ...dtype, ...rest, ...resources() },
      text: [
        `${file}: ${count(tasks, "task")}, ${count(modules, "module")}, ${bytes(rest.bytes)} ; the adapters have ${bytes(adapterBytes)} (${smaller(ratio)})`,
        `ΔW error: mean ${percent(mean)}, largest ${percent(max)} (${worstTask})`,
        sharing(breakEvenTasks),
      ],
    };
  },
});
