/** Keys, signatures and roots at the command line. Signatures are checked by Node's own crypto too. */
import { createPublicKey, verify } from "node:crypto";
import { copyFile, readFile } from "node:fs/promises";
import { join } from "node:path";
import { openPack } from "eigenlora";
import t from "tap";
import { json, run } from "../support/command-line.ts";
import { folderFor } from "../support/folder.ts";
import { vector } from "../support/packs.ts";

const folder = folderFor(t);
const at = (name: string): string => join(folder, name);

t.test("a key signs packs and task files", async (t) => {
  const made = await json(0, "keygen", "-o", at("me"));
  await copyFile(vector("grown.eigen"), at("p.eigen"));
  await copyFile(vector("whole.eigentask"), at("t.eigentask"));
  const before = await openPack(at("p.eigen"));
  const root = await before.integrity();
  const { signed } = await json(0, "sign", at("p.eigen"), at("t.eigentask"), "--key", at("me.pem"));
  t.equal(signed[0].integrity, root, "the root stays");
  const open = await readFile(at("me.pub.pem"), "utf8");
  const pack = await openPack(at("p.eigen"), { keys: [open], integrity: root });
  await pack.addTask("again", at("t.eigentask"), { integrity: signed[1].integrity });
  const { signature } = pack.window.superblock;
  const message = Buffer.concat([Buffer.from("eigenlora pack\n"), Buffer.from(root.slice(7), "base64")]);
  t.ok(verify(null, message, createPublicKey(open), signature!.bytes), "Node's crypto agrees");
  t.match(await json(0, "inspect", at("p.eigen")), { integrity: root, signedBy: made["key"] });
  await pack.close();
  await before.close();
});

t.test("verify: whose, which, and that every section has its hash", async (t) => {
  const checks = (await json(0, "verify", at("p.eigen"), "--key", at("me.pub.pem")))["checks"];
  t.match(
    checks.find(({ name }: any) => name === "signature"),
    { ok: true, detail: /^ed25519:/ },
  );
  const { signedBy } = await json(0, "inspect", at("p.eigen"));
  t.match(await json(0, "verify", at("p.eigen"), "--key", signedBy), { ok: true }, "the line that keygen prints");
  t.match(
    (await run("verify", at("p.eigen"), "--key", "ed25519:AAAA")).stderr,
    /--key ed25519:AAAA: expected an Ed25519/,
  );
  await json(0, "keygen", "-o", at("stranger"));
  const strange = await run("verify", at("p.eigen"), "--key", at("stranger.pub.pem"));
  t.equal(strange.status, 1);
  t.match(strange.stderr, /signed by ed25519:.*none of --key/);
  const other = await run("verify", at("p.eigen"), "--integrity", `sha256-${"A".repeat(43)}=`);
  t.equal(other.status, 1);
  t.match(other.stderr, /its root is sha256-/);
  t.match((await run("verify", at("p.eigen"), "--key", at("me.pem"))).stderr, /a private key/);
  const old = await json(0, "verify", vector("no-hashes.eigen"));
  t.match(old["checks"].find(({ name }: any) => name === "root").detail, /no hashes.*compact/);
});

t.test("what changes a pack drops its signature and says so, or signs anew", async (t) => {
  const key = ["--key", at("me.pem")];
  const trusted = { keys: [await readFile(at("me.pub.pem"), "utf8")] };
  const dropped = await run("remove", at("p.eigen"), "head");
  t.match(dropped.stderr, /was signed and no longer is/);
  await t.rejects(openPack(at("p.eigen"), trusted), { tag: "trust", message: /not signed/ });
  t.equal((await run("compact", at("p.eigen"), ...key)).stderr, "");
  await (await openPack(at("p.eigen"), trusted)).close();
  const added = await run("add", at("p.eigen"), at("t.eigentask"), "--as", "whole=more");
  t.match(added.stderr, /was signed and no longer is/);
  t.equal((await run("add", at("p.eigen"), at("t.eigentask"), "--as", "whole=even more", ...key)).stderr, "");
  t.equal((await run("remove", at("p.eigen"), "more", ...key)).stderr, "");
  const pack = await openPack(at("p.eigen"), trusted);
  t.same([...pack.tasks.keys()], ["terms", "whole", "same head", "same again", "even more"]);
  for (const id of pack.tasks.keys()) await pack.load(id);
  await pack.close();
});
