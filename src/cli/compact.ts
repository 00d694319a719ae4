/** The command compact: a pack without what appends have left behind, and with the hashes that old packs lack. */
import { freshPack } from "../pack/write.ts";
import { type Attach, command } from "./command.ts";
import { writeWhole } from "./files.ts";
import { key, revoked } from "./options.ts";
import { bytes } from "./output.ts";
import { signerOf, warnUnsigned } from "./signer.ts";

export const compact: Attach = command({
  usage: "compact <PACK>",
  does: "Rewrite a pack in place, without the gaps that changes have left.",
  details: "Tasks and components are not changed. A pack from before version 1.0 gets its hashes.",
  options: { key, revoked },
  async run([file]: [string], { key }, run, out) {
    const sign = await signerOf(key);
    await run.lock(file);
    const pack = await run.pack(file);
    const bytesBefore = pack.window.superblock.committed;
    const bytesAfter = await writeWhole(file, (await freshPack(pack, undefined, sign)).chunks);
    warnUnsigned(pack, sign, out);
    return {
      json: { file, bytesBefore, bytesAfter },
      text: [`${file}: ${bytes(bytesBefore)} → ${bytes(bytesAfter)}`],
    };
  },
});
