/**
 * How much memory do N adapters take, by the way they are held? Each figure is measured in a fresh process: resident set
 * after garbage collection minus before, with the base model's weights in none of them.
 *
 * The 20 real adapters of own-seed are repeated to reach N; only the count is real beyond 20. What is held in JavaScript:
 * every adapter (what a loader without a pack keeps, as f32), one adapter at a time (a file is read per switch), our pack
 * with all tasks resident, and our pack with the active task only (a range is read per switch).
 */
import { spawnSync } from "node:child_process";
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createRuntime, openPack } from "eigenlora";
import { buildPack, freshPack, openSafetensors, placeOf } from "eigenlora/build";
import { findAdapters, readAdapters } from "eigenlora/node";
import { drawLines } from "./chart.js";
import { data, print, python } from "./report.js";

const COUNTS = [1, 5, 20, 100, 300, 1000];
const PEFT_UP_TO = 100;
const SUITE = data("adapters/own-seed");
const [, script = "", mode, argument = "", count = "0"] = process.argv;

if (mode === "--hold") await hold(argument, Number(count), process.argv[5] ?? "");
else await compare();

/** @returns {Promise<number>} resident bytes after a full collection */
async function resident() {
  for (let i = 0; i < 4; i++) {
    globalThis.gc?.();
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  const status = await readFile("/proc/self/status", "utf8").catch(() => "");
  const kilobytes = /VmRSS:\s+(\d+)/.exec(status)?.[1];
  return kilobytes ? Number(kilobytes) * 1024 : process.memoryUsage().rss;
}

/**
 * The child's part: holds things one way and prints what that took.
 * @param {string} way @param {number} n @param {string} pack
 */
async function hold(way, n, pack) {
  const folders = (await findAdapters([SUITE])).map((a) => a.folder);
  /** @type {unknown[]} */
  const held = [];
  /** @param {number} i */
  const load = async (i) => {
    const bytes = await readFile(join(folders[i % folders.length], "adapter_model.safetensors"));
    const file = await openSafetensors({
      name: "adapter",
      byteLength: bytes.length,
      read: async (o, l) => bytes.subarray(o, o + l),
    });
    const tensors = new Map();
    for (const name of file.tensors.keys()) tensors.set(name, await file.readF32(name));
    return tensors;
  };
  await load(0);
  const before = await resident();
  let report;
  if (way === "all adapters") for (let i = 0; i < n; i++) held.push(await load(i));
  else if (way === "one adapter") for (let i = 0; i < n; i++) held[0] = await load(i);
  else {
    const opened = await openPack(pack, way === "pack, active task" ? { maxResidentBytes: 1 } : {});
    const runtime = await createRuntime(opened, { mode: "factors" });
    const ids = [...opened.tasks.keys()];
    if (way === "pack, all tasks") await opened.prefetch(ids);
    for (const id of ids.slice(0, 20)) await runtime.switchTask(id);
    report = runtime.memory();
    held.push(runtime);
  }
  const bytes = (await resident()) - before;
  console.log(JSON.stringify({ bytes, report, held: held.length }));
}

async function compare() {
  const scratch = await mkdtemp(join(tmpdir(), "eigenlora-bench-"));
  try {
    const adapters = await readAdapters([SUITE]);
    const { chunks } = await buildPack(adapters, { select: { kind: "k", k: 32 } });
    for (const adapter of adapters) await adapter.close();
    const pack = await openPack(new Uint8Array(Buffer.concat(chunks)));
    const ids = [...pack.tasks.keys()];
    /** @type {import("./report.js").Row[]} */
    const rows = [];
    /** @type {import("./report.js").Peer[]} */
    const peers = [];
    const folders = (await findAdapters([SUITE])).map((a) => a.folder);
    for (const n of COUNTS) {
      const tasks = [];
      for (let i = 0; i < n; i++) {
        const id = ids[i % ids.length];
        tasks.push({ entry: { id: `${id} ${i}`, adapterBytes: 0, metadata: {} }, blob: (await pack.load(id)).bytes });
      }
      const file = join(scratch, `${n}.eigen`);
      await writeFile(file, (await freshPack(pack, tasks.map(placeOf))).chunks);
      /** @type {import("./report.js").Row} */
      const row = { name: `${n} adapters` };
      for (const way of ["all adapters", "one adapter", "pack, all tasks", "pack, active task"]) {
        const child = spawnSync(process.execPath, ["--expose-gc", script, "--hold", way, String(n), file], {
          encoding: "utf8",
        });
        if (!child.stdout) throw new Error(child.stderr);
        row[`${way}, MB`] = JSON.parse(child.stdout).bytes / 1e6;
      }
      // Adding the n-th adapter takes PEFT a time that grows with n; 1000 take it a quarter of an hour.
      if (n > PEFT_UP_TO) {
        rows.push(row);
        continue;
      }
      const peer = python("memory.py", data("minilm"), String(n), ...folders);
      if ("figures" in peer) row["PEFT, all adapters, MB"] = peer.figures.bytes / 1e6;
      peers.push(
        "figures" in peer ? { name: "PEFT", version: peer.figures.version } : { name: "PEFT", reason: peer.reason },
      );
      rows.push(row);
    }
    const svg = process.argv.indexOf("--svg");
    if (svg > 0) {
      const names = Object.keys(rows[0]).filter((k) => k !== "name");
      const series = names.map((name) => ({
        name: name.replace(", MB", ""),
        points: rows.map((r, i) => [COUNTS[i], Number(r[name] ?? 0)]),
      }));
      await writeFile(
        process.argv[svg + 1] ?? "memory.svg",
        drawLines({ title: "Resident memory of N adapters", x: "adapters", y: "MB", series }),
      );
    }
    print({
      question: "How much resident memory do N LoRA adapters take (MiniLM, 12 modules, r 8; pack at K 32, f16)?",
      rows,
      peers: peers.slice(-1),
      notes: [
        "Resident set of a fresh process each, after minus before; below about 1 MB it is noise. Real adapters up to 20, then repeated.",
      ],
    });
  } finally {
    await rm(scratch, { recursive: true });
  }
}
