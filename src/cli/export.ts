/** The command export: from a task of a pack back to an adapter that other tools load. */
import { rm } from "node:fs/promises";
import { join } from "node:path";
import { peftFiles } from "../adapters/export.ts";
import { taskAdapter } from "../pack/expand.ts";
import { writeSafetensors } from "../tensor/safetensors-writer.ts";
import { type Attach, command } from "./command.ts";
import { jsonFile, makeFolder, writeTogether } from "./files.ts";
import { byDefault, choice, output, task, toggle } from "./options.ts";
import { bytes, count } from "./output.ts";
import { checkExport, EXPORTED } from "./target.ts";

export const exportTask: Attach = command({
  usage: "export <PACK>",
  does: "Write a task as an adapter that PEFT loads.",
  options: {
    output: output("FOLDER", "The folder to write, a new or an empty one."),
    force: toggle("Replace an earlier export. An adapter that was trained is never replaced."),
    task,
    format: byDefault("peft", choice(["peft"], "Layout of the files.")),
  },
  async run([path]: [string], { output: directory, force, task }, run) {
    await checkExport(directory, force);
    const adapter = await taskAdapter(await run.pack(path), task);
    const { config, tensors } = await peftFiles(adapter);
    const weights = join(directory, "adapter_model.safetensors");
    const marks = new Map([
      ["format", "pt"],
      [EXPORTED, task],
    ]);
    const about = join(directory, "task.json");
    const hasAbout = Object.keys(adapter.metadata).length > 0;
    await makeFolder(directory);
    await run.lock(weights);
    await checkExport(directory, force);
    const [size] = await writeTogether(
      [
        [weights, writeSafetensors(tensors, marks)],
        [join(directory, "adapter_config.json"), jsonFile(config)],
        ...(hasAbout ? [[about, jsonFile(adapter.metadata)] as const] : []),
      ],
      force,
    );
    // Of an earlier export: it would speak of another task.
    if (!hasAbout) await rm(about, { force: true });
    const modules = adapter.modules.size;
    return {
      json: { directory, task, modules, bytes: size! },
      text: [`${directory}: task "${task}", ${count(modules, "module")}, ${bytes(size!)}`],
    };
  },
});
