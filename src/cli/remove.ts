/** The command remove: drops tasks of a pack. */
import { freshPack } from "../pack/write.ts";
import { type Attach, command } from "./command.ts";
import { writeWhole } from "./files.ts";
import { key, UsageError } from "./options.ts";
import { bytes, count } from "./output.ts";
import { signerOf, warnUnsigned } from "./signer.ts";

export const remove: Attach = command({
  usage: "remove <PACK> <TASK...>",
  does: "Remove tasks from a pack.",
  details: "Other tasks are not changed.",
  options: { key },
  async run([file, ...ids]: [string, ...string[]], { key }, run, out) {
    const sign = await signerOf(key);
    await run.lock(file);
    const pack = await run.pack(file);
    for (const id of ids) pack.removeTask(id);
    if (pack.tasks.size === 0) throw new UsageError(`that would remove every task of ${file}; delete the file instead`);
    const bytesBefore = pack.window.superblock.committed;
    const bytesAfter = await writeWhole(file, (await freshPack(pack, undefined, sign)).chunks);
    warnUnsigned(pack, sign, out);
    return {
      json: { file, removed: ids, bytesBefore, bytesAfter },
      text: [`${file}: ${count(ids.length, "task")} removed, ${bytes(bytesBefore)} → ${bytes(bytesAfter)}`],
    };
  },
});
