/**
 * Options of trust: roots, keys, revoked tasks. The vectors' signatures are made by Node's own crypto; here ours are
 * checked against it too.
 */
import { createPublicKey, generateKeyPairSync, verify } from "node:crypto";
import { readFile } from "node:fs/promises";
import { type OpenOptions, openPack, type Pack, TrustError } from "eigenlora";
import { createSigner } from "eigenlora/build";
import t from "tap";
import { fromRoot } from "../support/folder.ts";
import { encodeSignedTaskFile, layoutAppend, layoutSigned } from "../support/internals/format.ts";
import { parseTaskFile } from "../support/internals/runtime.ts";
import { applied, concat, freshChunks } from "../support/packs.ts";
import { serve } from "../support/range-server.ts";
import { soak } from "../support/required.ts";

const vector = async (name: string): Promise<Uint8Array<ArrayBuffer>> =>
  new Uint8Array(await readFile(new URL(`../vectors/valid/${name}`, import.meta.url)));
const PACK = await vector("every-kind.eigen");
const SIGNED = await vector("signed.eigen");
/** Keys of the signed vector. */
const KEYS: string[] = JSON.parse(await readFile(fromRoot("test/vectors/index.json"), "utf8")).find(
  ({ file }: { file: string }) => file === "valid/signed.eigen",
).keys;
const ROOT = await (await openPack(PACK)).integrity();

/** An Ed25519 pair as PEM. */
function pair(): { secret: string; open: string } {
  const { privateKey, publicKey } = generateKeyPairSync("ed25519");
  return {
    secret: privateKey.export({ format: "pem", type: "pkcs8" }) as string,
    open: publicKey.export({ format: "pem", type: "spki" }) as string,
  };
}

/** Everything that a reader gets from a pack, as text. */
async function contents(bytes: Uint8Array, options: OpenOptions = {}): Promise<string> {
  const pack = await openPack(bytes, options);
  using bases = await pack.bases();
  const tasks = [];
  for (const [id, info] of pack.tasks) tasks.push([id, info.metadata, info.brings, hex((await pack.load(id)).bytes)]);
  return JSON.stringify([pack.basisId, pack.modules, hex(bases.bytes), tasks]);
}

const hex = (bytes: Uint8Array): string => Buffer.from(bytes).toString("hex");

t.test("a root names one pack; another is refused before anything is decoded", async (t) => {
  t.equal((await openPack(PACK, { integrity: ROOT })).tasks.size, 5);
  t.equal(await (await openPack(SIGNED)).integrity(), ROOT, "signing does not change it");
  const refused = openPack(PACK, { integrity: `sha256-${"A".repeat(43)}=` });
  await t.rejects(refused, {
    tag: "trust",
    message: /its root is sha256-.*expected sha256-A.*another pack or version/,
  });
  for (const integrity of ["", "sha256-abc", "sha512-abc", ROOT.slice(7), `${ROOT} `]) {
    await t.rejects(openPack(PACK, { integrity }), TypeError, JSON.stringify(integrity));
  }
});

t.test("one flipped bit anywhere: refused, or never used", { timeout: 240_000 }, async (t) => {
  const whole = await contents(SIGNED);
  const { directory, window } = await openPack(SIGNED);
  const { sections } = directory;
  const behind = window.superblock.directoryOffset + window.superblock.directoryLength;
  let [refused, unused] = [0, 0];
  // One bit of every byte, or of every third here and all in the soak; and all bits of the parts with offsets.
  const step = soak ? 1 : 3;
  for (let at = 0; at < SIGNED.length; at++) {
    const dense = at < 64 || (at >= 1024 && at < 1200);
    if (!dense && at % step > 0) continue;
    const bits = dense ? [0, 1, 2, 3, 4, 5, 6, 7] : [at % 8];
    for (const bit of bits) {
      const bytes = SIGNED.slice();
      bytes[at]! ^= 1 << bit;
      const found = await contents(bytes, { integrity: ROOT }).catch((error: unknown) => error);
      if (found === whole) {
        const padding = at >= behind && !sections.some((s) => at >= s.offset && at < s.offset + s.length);
        if (!padding && !(at >= 512 && at < 1024)) t.fail(`bit ${bit} of byte ${at} is not checked`);
        unused++;
      } else if (found instanceof Error && "tag" in found) refused++;
      else t.fail(`bit ${bit} of byte ${at}: ${found instanceof Error ? found.stack : "other contents"}`);
    }
  }
  t.comment(`${refused} refused, ${unused} never used`);
  t.ok(
    refused > 7000 / step && unused >= Math.floor(512 / step),
    "all but padding behind the bases and the superblock of no generation",
  );
});

t.test("keys: PEM, base64 and CryptoKey; signed by one of them or refused by name", async (t) => {
  const { secret, open } = pair();
  const sign = await createSigner(secret);
  const pack = await openPack(PACK);
  const bytes = applied(PACK, await layoutSigned(pack, sign));
  const raw = createPublicKey(open).export({ format: "der", type: "spki" }).subarray(12).toString("base64");
  const key = await crypto.subtle.importKey("raw", Buffer.from(raw, "base64"), "Ed25519", true, ["verify"]);
  const names = [
    open,
    raw,
    `ed25519:${raw}`,
    createPublicKey(open).export({ format: "der", type: "spki" }).toString("base64"),
    key,
  ];
  for (const name of names)
    t.equal((await openPack(bytes, { keys: [pair().open, name] })).tasks.size, 5, String(name).slice(0, 40));
  t.equal(await contents(bytes), await contents(PACK), "nothing else changes");
  await t.rejects(openPack(PACK, { keys: [open] }), { tag: "trust", message: /it is not signed/ });
  await t.rejects(openPack(bytes, { keys: [pair().open] }), {
    tag: "trust",
    message: /signed by ed25519:.*none of `keys`/,
  });
  await t.rejects(openPack(bytes, { keys: [] }), TrustError, "no key is no trust");
  await t.rejects(openPack(bytes, { keys: [secret] }), /a private key: give the public one/);
  for (const wrong of ["", "abc", raw.slice(4), 5, null, {}]) {
    await t.rejects(openPack(bytes, { keys: [wrong as string] }), {
      name: "TypeError",
      message: /keys\[0\]: expected/,
    });
  }
  await t.rejects(openPack(bytes, { keys: open as unknown as string[] }), /arrays/);

  const { signature } = (await openPack(bytes)).window.superblock;
  const hash = Buffer.from((await pack.integrity()).slice(7), "base64");
  const message = Buffer.concat([Buffer.from("eigenlora pack\n"), hash]);
  t.ok(verify(null, message, open, signature!.bytes), "Node's crypto agrees");
});

t.test("an append or a fresh pack is signed anew, or not at all", async (t) => {
  const { secret, open } = pair();
  const sign = await createSigner(secret);
  const pack = await openPack(SIGNED);
  const entry = { ...pack.tasks.get("head")!, id: "more" };
  const tasks = [{ entry, blob: (await pack.load("head")).bytes }];
  const plain = applied(SIGNED, await layoutAppend(pack, tasks));
  t.equal((await openPack(plain)).window.superblock.signature, undefined, "the old one is not of these bytes");
  const signed = await openPack(applied(SIGNED, await layoutAppend(pack, tasks, sign)), { keys: [open] });
  t.equal(signed.tasks.size, 6);
  for (const id of signed.tasks.keys()) await signed.load(id);
  t.not(await signed.integrity(), ROOT, "another generation, another root");
  const { basisId, directory } = pack;
  const fresh = { description: directory.basisBytes, bases: (await pack.bases()).bytes, basisId, tasks };
  t.equal((await openPack(concat(await freshChunks(fresh, sign)), { keys: [open] })).tasks.size, 1);
});

t.test("revoked tasks are not loaded", async (t) => {
  const hash = (await openPack(PACK)).tasks.get("head")!.integrity!;
  const pack = await openPack(PACK, { revoked: [hash] });
  await t.rejects(pack.load("head"), { tag: "trust", message: /task "head" is revoked \(sha256-/ });
  t.equal((await pack.load("whole")).parameters.length, 6, "others are");
  await t.rejects(openPack(PACK, { revoked: ["head"] }), TypeError);
  const bare = await openPack(await vector("no-hashes.eigen"), { revoked: [hash] });
  await t.rejects(bare.load("head"), TrustError, "whether the pack has hashes or not");
});

t.test("task files: a hash, a signature", async (t) => {
  const { secret, open } = pair();
  const sign = await createSigner(secret);
  const parsed = parseTaskFile(await vector("whole.eigentask"), "whole");
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", parsed.content as Uint8Array<ArrayBuffer>));
  const integrity = `sha256-${Buffer.from(digest).toString("base64")}`;
  const signed = encodeSignedTaskFile({ content: parsed.content, signature: await sign("task", digest) });
  const plain = await openPack(PACK);
  await plain.addTask("named", signed, { integrity });
  await t.rejects(plain.addTask("other", signed, { integrity: ROOT }), { tag: "trust", message: /its hash is/ });
  await t.rejects(plain.addTask("other", signed, { integrity: "x" }), TypeError);
  const packs: Pack[] = [];
  for (const keys of [[open], [pair().open]]) {
    packs.push(
      await openPack(applied(PACK, await layoutSigned(plain, await createSigner(secret))), { keys: [...keys, open] }),
    );
  }
  await packs[0]!.addTask("mine", signed);
  await t.rejects(packs[0]!.addTask("unsigned", parsed.content), { tag: "trust", message: /not signed/ });
  const stranger = await createSigner(pair().secret);
  const foreign = encodeSignedTaskFile({ content: parsed.content, signature: await stranger("task", digest) });
  await t.rejects(packs[0]!.addTask("foreign", foreign), { tag: "trust", message: /none of `keys`/ });
  const confused = encodeSignedTaskFile({ content: parsed.content, signature: await sign("pack", digest) });
  await t.rejects(packs[0]!.addTask("confused", confused), { tag: "trust", message: /is not of these bytes/ });
  t.notOk(
    ["unsigned", "foreign", "confused"].some((id) => packs[0]!.tasks.has(id)),
    "nothing is added",
  );
});

t.test("over HTTP a signed pack costs the requests of an unsigned one", async (t) => {
  const requests = [];
  for (const [bytes, options] of [
    [PACK, {}],
    [SIGNED, { keys: KEYS, integrity: ROOT }],
  ] as const) {
    const server = await serve(new Map([["pack", bytes]]));
    t.teardown(() => server.close());
    const pack = await openPack(server.url("pack"), options);
    (await pack.bases()).close();
    await pack.load("whole");
    requests.push(pack.reads.requests);
    await pack.close();
  }
  t.same(requests, [3, 3]);
});

t.test("where an engine has no SHA-256 or no Ed25519, hashes and keys are refused, never skipped", async (t) => {
  const keys = [pair().open];
  const subtle = Object.getOwnPropertyDescriptor(globalThis, "crypto")!;
  t.teardown(() => Object.defineProperty(globalThis, "crypto", subtle));
  const engine = (crypto: object): unknown =>
    Object.defineProperty(globalThis, "crypto", { value: crypto, configurable: true });
  engine({});
  await t.rejects(openPack(PACK, { integrity: ROOT }), /SHA-256 needs WebCrypto/);
  await t.rejects(openPack(PACK, { keys }), /SHA-256 needs WebCrypto/);
  t.equal((await openPack(PACK)).tasks.size, 5, "a pack that nobody asked to check opens");
  const real = (subtle.get?.call(globalThis) ?? subtle.value) as Crypto;
  const digest = (name: string, bytes: BufferSource): Promise<ArrayBuffer> => real.subtle.digest(name, bytes);
  const importKey = async (): Promise<never> => {
    throw new DOMException("Unrecognized name.", "NotSupportedError");
  };
  engine({ subtle: { digest, importKey } });
  t.equal((await openPack(SIGNED, { integrity: ROOT })).tasks.size, 5);
  await t.rejects(openPack(SIGNED, { keys: KEYS }), {
    tag: "trust",
    message: /signatures need Ed25519 in WebCrypto/,
  });
});
