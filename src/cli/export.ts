/** The command export: from a task of a pack back to an adapter that other tools load. */
import { join } from "node:path";
import { peftFiles } from "../adapters/export.ts";
import { taskAdapter } from "../pack/expand.ts";
import { writeSafetensors } from "../tensor/safetensors-writer.ts";
import { type Attach, command } from "./command.ts";
import { jsonFile, makeFolder, writeTogether } from "./files.ts";
import { byDefault, choice, output, task } from "./options.ts";
import { bytes } from "./output.ts";

export const exportTask: Attach = command({
  usage: "export <PACK>",
  does: "Write a task as an adapter that PEFT loads.",
  options: {
    output: output("FOLDER", "The folder to write."),
    task,
    format: byDefault("peft", choice(["peft"], "Layout of the files.")),
  },
  async run([path]: [string], { output: directory, task }, run) {
    const adapter = await taskAdapter(await run.pack(path), task);
    const { config, tensors } = await peftFiles(adapter);
    const weights = join(directory, "adapter_model.safetensors");
    const about = Object.keys(adapter.metadata).length > 0 ? [adapter.metadata] : [];
    await makeFolder(directory);
    await run.lock(weights);
    const [size] = await writeTogether([
      [weights, writeSafetensors(tensors, new Map([["format", "pt"]]))],
      [join(directory, "adapter_config.json"), jsonFile(config)],
      ...about.map((metadata) => [join(directory, "task.json"), jsonFile(metadata)] as const),
    ]);
    const modules = adapter.modules.size;
    return {
      json: { directory, task, modules, bytes: size! },
      text: [`${directory}: task "${task}", ${modules} modules, ${bytes(size!)}`],
    };
  },
});
