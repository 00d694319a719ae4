/**
 * Files of repositories of the Hugging Face Hub, against a server that answers as it does: what is downloaded, from
 * where, into which cache, what goes on after an interruption, and what is refused. Python's huggingface_hub reads the
 * same cache.
 */
import { spawn } from "node:child_process";
import { randomBytes } from "node:crypto";
import { lstatSync, readdirSync, readFileSync, readlinkSync, realpathSync, statSync } from "node:fs";
import { cp, rm, writeFile } from "node:fs/promises";
import { basename, join } from "node:path";
import { openPack, type Progress } from "eigenlora";
import { describeBase, readAdapters } from "eigenlora/node";
import { createEigenSession } from "eigenlora/onnxruntime";
import { build } from "esbuild";
import t, { type Test } from "tap";
import { json, run } from "../support/command-line.ts";
import { workIn } from "../support/folder.ts";
import {
  type Asked,
  type Files,
  filesBelow,
  gitHash,
  type Hub,
  hubFor,
  sha256,
} from "../support/huggingface-server.ts";
import { openHub } from "../support/internals/base.ts";
import { data } from "../support/packs.ts";
import { python, skip } from "../support/required.ts";
import { difference, feeds, golden, NODE, packBytes } from "../support/sessions.ts";

const text = (content: string): Uint8Array => new TextEncoder().encode(content);
const storage = (asked: readonly Asked[]): string[] =>
  asked.filter(({ origin }) => origin === "storage").map(({ path }) => path.split("/").slice(5).join("/"));

const TRAINING: Files = new Map([
  ["README.md", text("---\nbase_model: sentence-transformers/all-MiniLM-L6-v2\n---\n")],
  ["optimizer.pt", randomBytes(100_000)],
  ["training_args.bin", randomBytes(1000)],
  ["checkpoint-10/adapter_model.safetensors", randomBytes(100_000)],
  ["checkpoint-10/adapter_config.json", text("{}")],
]);
const seed = (id: string, prefix = ""): Files => filesBelow(data(`adapters/own-seed/${id}`), prefix);
const QUICK = { retries: 0 };

t.test("an adapter of a repository is the one on the disk, and nothing else is downloaded", async (t) => {
  const { hub, home } = await hubFor(t);
  const commit = hub.push("org/role", new Map([...TRAINING, ...seed("debtags-role")]));
  const told: Progress[] = [];
  const [found] = await readAdapters(["hf:org/role"], { onProgress: (progress) => void told.push(progress) });
  const [expected] = await readAdapters([data("adapters/own-seed/debtags-role")]);
  t.equal(found!.id, "role", "it is called as the repository is");
  t.same([...found!.modules.keys()], [...expected!.modules.keys()]);
  t.same(
    { ...found!.metadata, baseModel: found!.baseModel },
    { ...expected!.metadata, baseModel: expected!.baseModel },
  );
  const [module] = found!.modules.keys();
  t.same(await found!.modules.get(module!)!.read(), await expected!.modules.get(module!)!.read());
  const store = join(home, "hub/models--org--role");
  t.equal(found!.file, join(store, "snapshots", commit));
  t.equal(readFileSync(join(store, "refs/main"), "utf8"), commit);
  const names = ["adapter_config.json", "adapter_model.safetensors", "task.json"];
  t.same(readdirSync(found!.file).sort(), names);
  for (const name of names) {
    const own = told.filter(({ file }) => file === name);
    t.same([...new Set(own.map(({ status }) => status))], ["initiate", "download", "progress", "done"], name);
    t.match(own.at(-1), { stage: "adapter", name: `hf:org/role@${commit}`, progress: 100 });
  }
  for (const name of names) {
    const bytes = seed("debtags-role").get(name)!;
    const hash = name.endsWith(".safetensors") ? sha256(bytes) : gitHash(bytes);
    t.equal(readlinkSync(join(found!.file, name)), join("../../blobs", hash));
  }
  t.same(readdirSync(join(store, "blobs")).length, 3, "nothing half is left");
  await found!.close();
  await expected!.close();

  hub.take();
  const [again] = await readAdapters(["hf:org/role"]);
  t.same(
    hub.take().map(({ path }) => path),
    ["/api/models/org/role/revision/main"],
    "what is here is not read again",
  );
  await again!.close();
  const [pinned] = await readAdapters([`hf:org/role@${commit}`]);
  t.same(hub.take(), [], "a commit that is here needs nobody");
  await pinned!.close();
});

t.test("names: revisions, folders, files, addresses of pages; new ids by name", async (t) => {
  const { hub } = await hubFor(t);
  const old = hub.push("org/many", filesBelow(data("adapters/own-seed/debtags-use"), "skills/use/"));
  hub.push("org/many", filesBelow(data("adapters/own-seed/debtags-role"), "skills/use/"), "next/try");
  hub.push(
    "org/many",
    new Map([...filesBelow(data("adapters/own-seed/sections-0"), "skills/use/"), ...seed("sections-1")]),
  );
  const labels = async (name: string): Promise<unknown> => {
    const adapters = await readAdapters([name]);
    for (const adapter of adapters) await adapter.close();
    return adapters.map(({ id, metadata }) => `${id} ${(metadata["labels"] as string[])[0]}`);
  };
  const label = (id: string): string =>
    JSON.parse(readFileSync(data(`adapters/own-seed/${id}/task.json`), "utf8")).labels[0];
  t.same(await labels("hf:org/many"), [`many ${label("sections-1")}`], "an adapter's folder is one adapter");
  for (const path of ["/skills", "/skills/", "/skills/use", "/skills/use/adapter_model.safetensors"])
    t.same(await labels(`hf:org/many${path}`), [`use ${label("sections-0")}`], path);
  t.same(await labels("hf://org/many/skills"), [`use ${label("sections-0")}`]);
  t.same(await labels("hf://models/org/many/skills"), [`use ${label("sections-0")}`]);
  t.same(await labels(`hf:org/many@${old}`), [`use ${label("debtags-use")}`], "a commit");
  t.same(await labels("hf:org/many@next%2Ftry"), [`use ${label("debtags-role")}`], "a branch with a slash");
  t.same(await labels(`${hub.endpoint}/org/many/tree/next%2Ftry/skills`), [`use ${label("debtags-role")}`]);
  t.same(
    await labels("https://huggingface.co/org/many/blob/main/skills/use/adapter_config.json?download=true"),
    [`use ${label("sections-0")}`],
    "pages of the Hub stand for the same, wherever HF_ENDPOINT leads",
  );
  const renamed = await readAdapters(["hf:org/many@main", `hf:org/many@${old}`], {
    rename: new Map([
      ["hf:org/many/skills/use", "old"],
      ["many", "new"],
    ]),
  });
  t.same(
    renamed.map(({ id }) => id),
    ["new", "old"],
  );
  for (const adapter of renamed) await adapter.close();

  for (const [name, message] of [
    ["hf:many", /hf:many: names no repository; expected hf:org\/name, /],
    ["hf:org/many@", /names no revision/],
    ["hf:org/many@a..b", /names no revision/],
    ["hf:org/many@../../x", /names no revision/],
    ["hf:org/many/../../../etc/passwd", /names no file/],
    ["hf:../many", /names no repository/],
    ["hf:org/many\\..", /names no repository/],
    ["hf:org--many/x", /names no repository/],
    ["hf:org/many@a\0b", /names no revision/],
    ["hf:org/many@\ud800", /names no revision/],
    ["hf:org/many/\ud800", /names no file/],
    ["hf:datasets/org/many", /names one of the Hub's datasets, not the repository of a model/],
    ["https://huggingface.co/collections/org/skills-1234", /names one of the Hub's collections/],
  ] as const) {
    await t.rejects(readAdapters([name]), { name: "TypeError", message }, name);
  }
});

t.test("all files are of one commit, whatever is pushed meanwhile", async (t) => {
  const { hub } = await hubFor(t);
  const first = hub.push("org/role", seed("debtags-role"));
  hub.onFile = () => hub.push("org/role", seed("debtags-use"));
  const [adapter] = await readAdapters(["hf:org/role"]);
  t.equal(basename(adapter!.file), first);
  t.same(
    adapter!.metadata["labels"],
    JSON.parse(readFileSync(data("adapters/own-seed/debtags-role/task.json"), "utf8")).labels,
  );
  await adapter!.close();
});

t.test("the token is for the Hub, and nobody else sees it", async (t) => {
  const { hub, home } = await hubFor(t);
  hub.push("org/secret", new Map([...seed("debtags-role"), ["tasks.eigen", await packBytes(["adapters"])]]));
  hub.repositories.get("org/secret")!.access = "private";
  await t.rejects(readAdapters(["hf:org/secret"]), {
    tag: "source",
    status: 401,
    message:
      /^hf:org\/secret: the Hub has no such repository, or does not show it: check the name, and set HF_TOKEN if/,
  });
  process.env["HF_TOKEN"] = "hf_wrong";
  await t.rejects(readAdapters(["hf:org/secret"]), {
    message: /the Hub does not know the token that was sent; make another at .*\/settings\/tokens/,
  });
  for (const give of [
    () => (process.env["HF_TOKEN"] = hub.token),
    () => writeFile(join(home, "token"), `${hub.token}\n`),
    () => undefined,
  ]) {
    delete process.env["HF_TOKEN"];
    await rm(join(home, "hub"), { recursive: true, force: true });
    await give();
    hub.take();
    const headers = { authorization: `Bearer ${hub.token}` };
    const [adapter] = await readAdapters(["hf:org/secret"], give() === undefined ? { headers } : {});
    await adapter!.close();
    if (process.env["HF_TOKEN"]) await (await openPack("hf:org/secret/tasks.eigen")).close();
    const asked = hub.take();
    t.ok(asked.some(({ origin }) => origin === "storage"));
    for (const { origin, authorization, path } of asked)
      t.equal(authorization, origin === "hub" ? `Bearer ${hub.token}` : undefined, path);
    await rm(join(home, "token"), { force: true });
  }
});

t.test("gated, missing, another revision, another file, no Hub, no network", async (t) => {
  const { hub } = await hubFor(t);
  hub.push("org/gated", seed("debtags-role"));
  hub.repositories.get("org/gated")!.access = "gated";
  const refused = (name: string, message: RegExp, status?: number) =>
    t.rejects(readAdapters([name], QUICK), { message, ...(status === undefined ? {} : { status }) }, name);
  await refused(
    "hf:org/gated",
    /hf:org\/gated: is gated: accept its licence at http.*\/org\/gated with your account, and set HF_TOKEN/,
    401,
  );
  await refused("hf:org/no-such", /hf:org\/no-such: the Hub has no such repository/, 401);
  await refused(
    "hf:org/gated@v2",
    /hf:org\/gated@v2: has no revision "v2"; check the branch, tag or commit \(status 404\)/,
    404,
  );
  hub.repositories.get("org/gated")!.access = undefined as never;
  await refused(
    "hf:org/gated/skills",
    /\/skills: there is no such file or folder; the repository has adapter_config.json, /,
  );
  await t.rejects(openHub("hf:org/gated/task.jsn"), {
    tag: "source",
    message: /^hf:org\/gated@[0-9a-f]{40}\/task.jsn: there is no such file; the nearest are task.json/,
  });
  await t.rejects(openPack("hf:org/gated"), {
    message: /names a repository, and a file of it is needed$/,
  });
  for (const [listing, message] of [
    [() => "<html>", /does not answer as the Hub does .*check HF_ENDPOINT/],
    [() => ({}), /does not answer as the Hub does \("sha" is undefined\)/],
    [() => ({ sha: "a".repeat(2 ** 24) }), /lists more files than fit into 16777216 bytes/],
    [
      (json: object) => ({ ...json, siblings: [{ rfilename: "../../../x", size: 1, blobId: "a".repeat(40) }] }),
      /"..\/..\/..\/x" has/,
    ],
    [
      (json: object) => ({ ...json, siblings: [{ rfilename: "a", size: -1, blobId: "a".repeat(40) }] }),
      /"a" has the size -1/,
    ],
    [(json: object) => ({ ...json, siblings: [{ rfilename: "a", size: 1, blobId: "../x" }] }), /and the hash ..\/x/],
    [
      (json: { sha: string }) => ({ ...json, sha: [json.sha] }),
      /does not answer as the Hub does \("sha" is [0-9a-f]{40}\)/,
    ],
    [
      (json: object) => ({ ...json, siblings: [{ rfilename: "a", size: 1, blobId: ["a".repeat(40)] }] }),
      /"a" has the size 1 and the hash a{40}/,
    ],
    [
      (json: object) => ({ ...json, siblings: [{ rfilename: "\ud800/task.json", size: 1, blobId: "a".repeat(40) }] }),
      /"\\ud800\/task.json" has the size 1/,
    ],
  ] as const) {
    hub.listing = listing as Hub["listing"];
    hub.push("org/gated", new Map([["a", text(String(message))]]));
    await refused("hf:org/gated", message);
  }
  process.env["HF_ENDPOINT"] = "huggingface.co";
  await refused("hf:org/gated", /HF_ENDPOINT is "huggingface.co", expected an address/);
  process.env["HF_ENDPOINT"] = "http://127.0.0.1:9";
  await refused("hf:org/gated", /cannot be fetched/);
});

t.test("a download that breaks off goes on where it was", async (t) => {
  const { hub, home } = await hubFor(t);
  const bytes = randomBytes(5_000_000);
  hub.push("org/large", new Map([["weights.bin", bytes]]));
  hub.budget = 1_500_000;
  await t.rejects(openHub("hf:org/large/weights.bin", QUICK), {
    tag: "source",
    transient: true,
    message: /connection/,
  });
  const blob = join(home, "hub/models--org--large/blobs", sha256(bytes));
  t.equal(statSync(`${blob}.eigenlora.incomplete`).size, 2 ** 20, "the first piece is here");
  hub.budget = Infinity;
  hub.take();
  const seen: number[] = [];
  const onProgress = ({ status, loaded }: Progress): void => void (status === "progress" && seen.push(loaded));
  const source = await openHub("hf:org/large/weights.bin", { onProgress });
  t.equal(sha256(await source.read(0, bytes.length)), sha256(bytes));
  t.equal(source.name, `hf:org/large@${hub.repositories.get("org/large")!.refs.get("main")}/weights.bin`);
  await source.close?.();
  const ranges = hub.take().flatMap(({ origin, range }) => (origin === "storage" ? [range] : []));
  t.equal(ranges[0], `bytes=${2 ** 20}-${2 ** 21 - 1}`);
  t.equal(seen[0], 2 ** 20, "what was here is told at once");
  t.equal(seen.at(-1), bytes.length);
  t.throws(() => statSync(`${blob}.eigenlora.incomplete`), "nothing half is left");
  t.equal(lstatSync(blob).mode & 0o444, 0o444);

  await rm(join(home, "hub"), { recursive: true });
  const both = await Promise.all([1, 2, 3, 4, 5, 6].map(() => openHub("hf:org/large/weights.bin")));
  for (const one of both) {
    t.equal(sha256(await one.read(0, bytes.length)), sha256(bytes), "six at a time do not harm each other");
    await one.close?.();
  }
});

t.test("what is not what the Hub promised is refused, and not kept", async (t) => {
  const { hub, home } = await hubFor(t);
  const bytes = randomBytes(1000);
  hub.push(
    "org/large",
    new Map([
      ["weights.bin", bytes],
      ["empty.txt", new Uint8Array(0)],
    ]),
  );
  const open = () => openHub("hf:org/large/weights.bin", QUICK);
  for (const [instead, message] of [
    [() => randomBytes(1000), /has the hash [0-9a-f]{64}, where the Hub promises [0-9a-f]{64}; nothing of it was kept/],
    [() => bytes.subarray(0, 900), /ends at byte 900, but bytes 0 to 1000 are needed/],
  ] as const) {
    hub.instead = instead;
    await t.rejects(open(), { tag: "source", message });
    t.notOk(readdirSync(join(home, "hub/models--org--large/blobs")).includes(sha256(bytes)));
  }
  hub.instead = undefined;
  await (await open()).close?.();
  const blob = join(home, "hub/models--org--large/blobs", sha256(bytes));
  await writeFile(blob, "short");
  const mended = await open();
  t.same(await mended.read(0, 1000), new Uint8Array(bytes), "one that somebody has cut off is downloaded again");
  await mended.close?.();
  const empty = await openHub("hf:org/large/empty.txt");
  t.equal(empty.byteLength, 0);
  await empty.close?.();
});

t.test("without a network: what is in the cache, and no request", async (t) => {
  const { hub, home } = await hubFor(t);
  const commit = hub.push("org/role", seed("debtags-role"));
  const packed = await packBytes(["adapters"]);
  hub.push("org/pack", new Map([["tasks.eigen", packed]]));
  for (const adapter of await readAdapters(["hf:org/role"])) await adapter.close();
  const first = await openPack(await openHub("hf:org/pack/tasks.eigen"));
  await first.close();
  hub.take();
  process.env["HF_HUB_OFFLINE"] = "1";
  const [adapter] = await readAdapters(["hf:org/role"]);
  t.equal(basename(adapter!.file), commit);
  await adapter!.close();
  const pack = await openPack(await openHub("hf:org/pack/tasks.eigen"));
  t.same([...pack.tasks.keys()].sort(), [...first.tasks.keys()].sort());
  await pack.close();
  await t.rejects(openHub("hf:org/role/README.md"), { message: /there is no such file/ });
  await t.rejects(openHub("hf:org/other/tasks.eigen"), {
    message: /^hf:org\/other: is not in the cache, and HF_HUB_OFFLINE forbids to ask the Hub/,
  });
  await rm(join(home, "hub/models--org--pack/snapshots"), { recursive: true });
  await t.rejects(openHub("hf:org/pack/tasks.eigen"), { message: /tasks.eigen: is not in the cache, and/ });
  t.same(hub.take(), []);
});

t.test("a whole model is no adapter, and is not downloaded to find that out", async (t) => {
  const { hub } = await hubFor(t);
  const base = readFileSync(data("sessions/base.safetensors"));
  const config = text('{"num_attention_heads": 2}');
  hub.push(
    "org/model",
    new Map([
      ["config.json", config],
      ["model.safetensors", base],
      ["pytorch_model.bin", randomBytes(10)],
    ]),
  );
  hub.push(
    "org/old",
    new Map([
      ["config.json", config],
      ["pytorch_model.bin", randomBytes(10)],
    ]),
  );
  hub.push(
    "org/pickle",
    new Map([
      ["adapter_config.json", text("{}")],
      ["adapter_model.bin", randomBytes(10)],
    ]),
  );
  const before = storage(hub.take());
  t.same(before, []);
  await t.rejects(readAdapters(["hf:org/model"]), {
    tag: "adapter",
    message: /^hf:org\/model@[0-9a-f]{40}: holds no adapter.*It holds model.safetensors. A whole model is no adapter/,
  });
  await t.rejects(readAdapters(["hf:org/model/model.safetensors"]), {
    message: /model.safetensors: holds no LoRA, but \d+ tensors such as .*A whole model is no adapter/,
  });
  await t.rejects(readAdapters(["hf:org/old"]), { message: /It holds pytorch_model.bin. A whole model is no adapter/ });
  await t.rejects(readAdapters(["hf:org/pickle"]), { message: /adapter_model.bin: is a Python pickle/ });
  const read = hub.take().flatMap(({ origin, range }) => (origin === "storage" ? [range] : []));
  t.ok(
    read.every((range) => range !== undefined && /bytes=(0-7|8-\d+)$/.test(range)),
    `headers alone are read: ${read}`,
  );

  hub.push(
    "org/base",
    new Map([
      ["config.json", config],
      ["model.safetensors", base],
    ]),
  );
  const local = await describeBase(data("sessions/base.safetensors"));
  t.same((await describeBase("hf:org/base")).names, local.names);
  t.equal((await describeBase("hf:org/base/config.json")).heads, 2);
  const ranges = hub.take().flatMap(({ origin, range }) => (origin === "storage" ? [range] : []));
  t.ok(
    ranges.every((range) => range !== undefined && /bytes=(0-7|8-\d+)$/.test(range)),
    `of a base, too: ${ranges}`,
  );
});

t.test("a pack, and a model with its weights beside it, of one commit", async (t) => {
  const { hub } = await hubFor(t);
  const files = ["external.onnx", "external.onnx.data"].map(
    (name) => [`onnx/${name}`, readFileSync(data(`sessions/${name}`))] as const,
  );
  const commit = hub.push("org/model", new Map(files));
  hub.push("org/pack", new Map([["tasks.eigen", await packBytes(["adapters"], "base")]]));
  const told: Progress[] = [];
  const onProgress = (progress: Progress): void => void told.push(progress);
  const pack = await openPack("hf:org/pack/tasks.eigen", { onProgress });
  t.equal(pack.name, `${hub.endpoint}/org/pack/resolve/main/tasks.eigen`, "it is read by ranges");
  // Main is another commit when the weights are read, and lacks them.
  hub.onFile = () => {
    hub.onFile = undefined;
    hub.push("org/model", new Map([["README.md", text("moved")]]));
  };
  const session = await createEigenSession(NODE, "hf:org/model/onnx/external.onnx", pack, { onProgress });
  for (const [stage, file] of [
    ["pack", "tasks.eigen"],
    ["model", "external.onnx"],
    ["model", "external.onnx.data"],
  ]) {
    const own = told.filter((one) => one.file === file && one.status !== "ready");
    t.same([...new Set(own.map(({ status }) => status))], ["initiate", "download", "progress", "done"], file);
    const name = stage === "pack" ? /\/org\/pack\/resolve\/main$/ : /^hf:org\/model@[0-9a-f]{40}/;
    t.match(own.at(-1), { stage, name, progress: 100 });
  }
  t.equal(told.at(-1)!.status, "ready");
  await session.switchTask("two");
  const { logits } = (await session.run(feeds(NODE, session))) as unknown as { logits: { data: Float32Array } };
  t.ok(difference(logits.data, golden("base", "two")) < 1e-4);
  t.ok(
    hub
      .take()
      .some(({ path }) => path.startsWith("/signed/org/model/") && path.includes(commit) && path.endsWith(".data")),
  );
  await session.close();
  await pack.close();
});

t.test("a browser reads the Hub's address by ranges", async (t) => {
  const { outputFiles } = await build({
    stdin: { contents: 'export { openPack } from "eigenlora";', resolveDir: data("../..") },
    ...{ bundle: true, format: "esm", platform: "browser", write: false, logLevel: "silent" },
  });
  const folder = t.testdir({ "browser.mjs": outputFiles[0]!.text });
  const browser = (await import(join(folder, "browser.mjs"))) as { openPack: typeof openPack };
  const bytes = await packBytes(["adapters"]);
  const asked: string[] = [];
  const ask = async (url: string, { headers }: RequestInit): Promise<Response> => {
    asked.push(url);
    const [, from, to] = /bytes=(\d+)-(\d+)/.exec(new Headers(headers).get("range") ?? "")!.map(Number);
    const range = { "content-range": `bytes ${from}-${to}/${bytes.length}`, etag: '"a"' };
    return new Response(bytes.slice(from, to! + 1), { status: 206, headers: range });
  };
  for (const [name, address] of [
    ["hf:org/name/tasks.eigen", "https://huggingface.co/org/name/resolve/main/tasks.eigen"],
    ["hf://org/name@v1/a b/tasks.eigen", "https://huggingface.co/org/name/resolve/v1/a%20b/tasks.eigen"],
  ] as const) {
    const pack = await browser.openPack(name, { fetch: ask });
    t.equal(pack.name, address);
    t.ok(asked.splice(0).every((url) => url === address));
    await pack.close();
  }
});

const CODE = `
import sys
from huggingface_hub import hf_hub_download, snapshot_download
name, file, offline = sys.argv[1:4]
how = {"local_files_only": offline == "offline"}
print(hf_hub_download(name, file, **how))
print(snapshot_download(name, allow_patterns=["adapter_*", "task.json"], **how))
`;

t.test("Python's huggingface_hub shares the cache", async (t) => {
  const { hub, home } = await hubFor(t);
  const commit = hub.push("org/role", new Map([...TRAINING, ...seed("debtags-role")]));
  const inPython = (how: string) =>
    new Promise<{ status: number | null; lines: string[]; said: string }>((resolve) => {
      const env = { ...process.env, HF_HUB_DISABLE_XET: "1", HF_HUB_DISABLE_PROGRESS_BARS: "1" };
      const args = ["-c", CODE, "org/role", "adapter_model.safetensors", how];
      const child = spawn(python, args, { env });
      let [out, said] = ["", ""];
      child.stdout.on("data", (chunk) => (out += chunk));
      child.stderr.on("data", (chunk) => (said += chunk));
      child.on("error", (error) => resolve({ status: -1, lines: [], said: error.message }));
      child.on("close", (status) => resolve({ status, lines: out.trim().split("\n"), said }));
    });
  for (const adapter of await readAdapters(["hf:org/role"])) await adapter.close();
  const folder = join(home, "hub/models--org--role/snapshots", commit);
  const { status, lines, said } = await inPython("offline");
  if (status === -1 || /No module named/.test(said)) {
    return skip(t, "peft", `huggingface_hub is not here: ${said.trim().split("\n").at(-1)}`);
  }
  t.equal(status, 0, said);
  t.same(
    lines.map((line) => realpathSync(line)),
    [join(folder, "adapter_model.safetensors"), folder].map((path) => realpathSync(path)),
    "it finds ours",
  );

  await rm(join(home, "hub"), { recursive: true });
  const theirs = await inPython("online");
  t.equal(theirs.status, 0, theirs.said);
  hub.take();
  process.env["HF_HUB_OFFLINE"] = "1";
  const [adapter] = await readAdapters(["hf:org/role"]);
  t.equal(adapter!.file, folder, "we find its");
  await adapter!.close();
  t.same(hub.take(), []);
});

/** Names of the Hugging Face Hub on the command line, against a server that answers as the Hub does. */
async function work(t: Test): Promise<Awaited<ReturnType<typeof hubFor>>> {
  workIn(t);
  return hubFor(t);
}

const session = (name: string): Uint8Array => readFileSync(data(`sessions/${name}`));
t.test("pack, add and verify take repositories, revisions and folders", async (t) => {
  const { hub } = await work(t);
  hub.push("org/role", seed("debtags-role"));
  hub.push("org/use", seed("debtags-use"), "v1");
  hub.push("org/use", new Map([["README.md", text("moved")]]));
  hub.push("org/many", new Map([...seed("sections-0", "skills/zero/"), ...seed("sections-1", "skills/one/")]));
  const how = ["--as", "use=used", "--k", "2"];
  const made = await json(0, "pack", "org/role", "org/use@v1", "hf:org/many/skills", ...how, "-o", "hub.eigen");
  t.same(made["tasks"], 4);
  for (const [id, name] of [
    ["role", "debtags-role"],
    ["use", "debtags-use"],
    ["zero", "sections-0"],
    ["one", "sections-1"],
  ] as const)
    await cp(data(`adapters/own-seed/${name}`), `local/${id}`, { recursive: true });
  await json(0, "pack", "local", ...how, "-o", "local.eigen");
  t.ok(readFileSync("hub.eigen").equals(readFileSync("local.eigen")), "the pack is that of the same files on the disk");
  hub.push("org/late", seed("sections-2"));
  const added = await json(0, "add", "hub.eigen", `${hub.endpoint}/org/late`, "--max-loss", "1");
  t.match(added, { added: ["late"] });
  const against = await json(0, "verify", "hub.eigen", "--against", "org/late");
  t.ok(against["ok"]);

  hub.push("org/pack", new Map([["tasks.eigen", readFileSync("hub.eigen")]]));
  const shown = await run("inspect", "hf:org/pack/tasks.eigen");
  t.match(shown, { status: 0, stdout: /hf:org\/pack@[0-9a-f]{40}\/tasks.eigen|5 tasks/ });
  t.ok((await json(0, "verify", `${hub.endpoint}/org/pack/resolve/main/tasks.eigen`))["ok"]);
  for (const change of [
    ["add", "hf:org/pack/tasks.eigen", "org/role"],
    ["compact", "hf:org/pack/tasks.eigen"],
  ])
    t.match(await run(...change), { status: 2, stderr: /lies on the Hugging Face Hub, and the file is to be changed/ });
});

t.test("a path on the disk wins, and what is mistyped is told", async (t) => {
  const { hub } = await work(t);
  hub.push("org/role", seed("debtags-role"));
  await cp(data("adapters/own-seed/debtags-use"), "org/role", { recursive: true });
  const { metadata } = (await json(0, "pack", "org/role", "--k", "2", "-o", "a.eigen")) as never;
  t.equal(metadata, undefined);
  t.same(hub.take(), [], "the Hub is not asked");
  const typo = await run("pack", "org/rolf", "-o", "b.eigen");
  t.match(typo, { status: 1, stderr: /org\/rolf: does not exist or cannot be read; check the path/ });
  t.same(hub.take(), [], "nor where the folder is here");
  const far = await run("pack", "orgs/role", "-o", "b.eigen");
  t.match(
    far.stderr.replace(/\s+/g, " "),
    /hf:orgs\/role: the Hub has no such repository.*There is no file or folder orgs\/role here, so it was taken for a repository of the Hugging Face Hub/,
  );
  t.equal(far.status, 1);
  t.match(await run("pack", "hf:role", "-o", "b.eigen"), { status: 1, stderr: /expected hf:org\/name/ });
});

t.test("check takes a repository's model, with what lies beside it", async (t) => {
  const { hub, home } = await work(t);
  const model = new Map([
    ["onnx/external.onnx", session("external.onnx")],
    ["onnx/external.onnx.data", session("external.onnx.data")],
    ["onnx/unrelated.data", new Uint8Array(1000)],
    ["tokenizer.json", text("{}")],
    ["tokenizer_config.json", text("{}")],
    ["pytorch_model.bin", new Uint8Array(1000)],
  ]);
  const commit = hub.push("org/model", model);
  hub.push("org/pack", new Map([["tasks.eigen", await packBytes(["adapters"], "base")]]));
  const checked = await json(0, "check", "org/model", "hf:org/pack/tasks.eigen");
  t.match(checked, {
    works: true,
    model: "hf:org/model/onnx/external.onnx",
    next: 'createEigenSession(ort, "hf:org/model/onnx/external.onnx", await openPack("hf:org/pack/tasks.eigen"))',
    run: { session: { works: true } },
  });
  const snapshot = join(home, "hub/models--org--model/snapshots", commit);
  const here = readdirSync(snapshot, { recursive: true, encoding: "utf8" }).sort();
  t.same(here, ["onnx", "onnx/external.onnx", "onnx/external.onnx.data", "tokenizer.json", "tokenizer_config.json"]);
  const moved = await json(2, "attach", "hf:org/model/onnx/external.onnx", "hf:org/pack/tasks.eigen", "-o", "a.onnx");
  t.match(moved["error"].message, /has weights in .*external\.onnx\.data; .* copy that folder first/);

  hub.push("org/model", new Map([...model, ["onnx/model_q4.onnx", session("q4.onnx")]]));
  const { error } = await json(1, "check", "org/model", "hf:org/pack/tasks.eigen");
  t.match(error, {
    message: /: holds several models; name one of onnx\/external.onnx, onnx\/model_q4.onnx/,
  });
  hub.push("org/plain", new Map([["model.safetensors", session("base.safetensors")]]));
  const none = await json(1, "check", "org/plain", "hf:org/pack/tasks.eigen");
  t.match(none["error"], { message: /hf:org\/plain@.*: holds no ONNX model; export one/ });
});
