/** The commands keygen and sign: a key of one's own, and packs and task files that it vouches for. */
import { readFile } from "node:fs/promises";
import { parseTaskFile } from "../core/task-file.ts";
import { keyName } from "../core/trust.ts";
import type { Sign } from "../format/encode.ts";
import { integrityOf } from "../format/fields.ts";
import { planSignature, signTaskFile } from "../pack/write.ts";
import { toBase64 } from "../text.ts";
import { isTaskFile, signerOf } from "./change.ts";
import { type Attach, command } from "./command.ts";
import { append, writeTogether, writeWhole } from "./files.ts";
import { realTarget } from "./lock.ts";
import { force, key, output, required, UsageError } from "./options.ts";
import type { Run } from "./run.ts";
import { checkTarget } from "./target.ts";

export const keygen: Attach = command({
  usage: "keygen",
  does: "Make an Ed25519 key pair to sign with.",
  details: "Keep NAME.pem to yourself. Readers of your packs need NAME.pub.pem, or the line that is printed.",
  example: "keygen -o me",
  options: { output: output("NAME", "Write NAME.pem and NAME.pub.pem."), force },
  async run(_: [], { output: name, force }) {
    const [secret, open] = [`${name}.pem`, `${name}.pub.pem`];
    if (/(^|[/\\])$/.test(name)) throw new UsageError(`--output ${name}: ends like a folder; name a file in it`);
    for (const path of [secret, open]) checkTarget(path, { force, output: name });
    const pair = (await crypto.subtle.generateKey("Ed25519", true, ["sign", "verify"])) as CryptoKeyPair;
    const raw = new Uint8Array(await crypto.subtle.exportKey("raw", pair.publicKey));
    await writeTogether(
      [
        [secret, [await pem("PRIVATE KEY", "pkcs8", pair.privateKey)], 0o600],
        [open, [await pem("PUBLIC KEY", "spki", pair.publicKey)]],
      ],
      force,
    );
    return {
      json: { secret, public: open, key: keyName(raw) },
      text: [`${secret}: keep it to yourself`, `${open}: ${keyName(raw)}`],
    };
  },
});

async function pem(what: string, format: "pkcs8" | "spki", made: CryptoKey): Promise<Uint8Array> {
  const body = toBase64(new Uint8Array(await crypto.subtle.exportKey(format, made)));
  const lines = body.match(/.{1,64}/g)!.join("\n");
  return new TextEncoder().encode(`-----BEGIN ${what}-----\n${lines}\n-----END ${what}-----\n`);
}

export const sign: Attach = command({
  usage: "sign <FILE...>",
  does: "Sign packs and task files with an Ed25519 key.",
  details: "Readers that are given the public key then accept nothing else. The root of a pack does not change.",
  example: "sign tasks.eigen --key me.pem",
  options: { key: required(key) },
  reads: ["own"],
  async run(files: string[], { key }, run) {
    const signer = (await signerOf(key))!;
    const signed: { file: string; integrity: string }[] = [];
    const once = new Map(files.map((file) => [realTarget(file), file]));
    for (const file of once.values()) signed.push({ file, integrity: await signFile(file, signer, run) });
    return { json: { signed }, text: signed.map(({ file, integrity }) => `${file}: signed, ${integrity}`) };
  },
});

/** @returns what names the file: the root of a pack, the hash of a task file */
async function signFile(file: string, signer: Sign, run: Run): Promise<string> {
  await run.lock(file);
  if (await isTaskFile(file, run)) {
    const bytes = await signTaskFile(new Uint8Array(await readFile(file)), signer);
    await writeWhole(file, [bytes]);
    return integrityOf(parseTaskFile(bytes, file).content);
  }
  const pack = await run.pack(file, { bases: "later" });
  append(file, await planSignature(pack, signer));
  return pack.integrity();
}
