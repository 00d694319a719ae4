/** The lock of writers, and the remains of a writer that is stopped halfway: none. */
import { spawn, spawnSync } from "node:child_process";
import { once } from "node:events";
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { chmod, mkdir, readdir, readFile, rm, stat, symlink, truncate, writeFile } from "node:fs/promises";
import { join } from "node:path";
import t from "tap";
import { folderFor } from "../support/folder.ts";
import { COMMAND_LINE, openScratch, takeLock, writeTogether, writeWhole } from "../support/internals/cli.ts";
import { soak } from "../support/required.ts";

const folder = folderFor(t);
const silent = (): void => undefined;
const module = (name: string): string => JSON.stringify(new URL(`${name}.js`, COMMAND_LINE).href);

/** Starts a process that holds the lock of a file and says so. */
async function holder(path: string, then = "setInterval(() => {}, 1000);") {
  const code = `import { takeLock, writeWhole } from ${module("files")};
    const path = ${JSON.stringify(path)};
    const lock = await takeLock(path, () => {}); console.log("held"); ${then}`;
  const child = spawn(process.execPath, ["--input-type=module", "-e", code], { stdio: ["ignore", "pipe", "inherit"] });
  await once(child.stdout, "data");
  return child;
}

/** Writes a lock as another process would have left it. */
function plant(path: string, changes: object): void {
  const self = JSON.parse(own);
  writeFileSync(`${path}.lock`, JSON.stringify({ ...self, token: "0123456789abcdef", ...changes }));
}
const probe = join(folder, "probe");
const first = await takeLock(probe, silent);
const own = readFileSync(`${probe}.lock`, "utf8");
first.close();

t.test("a living owner is waited for, and named when it takes too long", async (t) => {
  const path = join(folder, "living");
  const child = await holder(path);
  const said: string[] = [];
  const name = new RegExp(`process ${child.pid} on .+ \\(since 20`);
  await t.rejects(
    takeLock(path, (message) => said.push(message), 1500),
    { tag: "source", file: path, message: name },
  );
  t.match(said, [name], "said once what it waits for");
  const waiting = takeLock(path, silent);
  child.kill("SIGTERM");
  (await waiting).close();
  t.notOk(existsSync(`${path}.lock`));
});

t.test("the lock of a process that is gone is taken over, with what it left", async (t) => {
  const path = join(folder, "gone");
  const child = await holder(path);
  child.kill("SIGKILL");
  await once(child, "exit");
  await writeFile(`${path}.0a1b2c3d.tmp`, "half of a file");
  await writeFile(`${path}.notes.tmp`, "somebody's");
  t.ok(existsSync(`${path}.lock`), "SIGKILL leaves it");
  (await takeLock(path, silent)).close();
  t.same(
    (await readdir(folder)).filter((name) => name.startsWith("gone")),
    ["gone.notes.tmp"],
  );
  const { pid, platform } = process;
  // After a restart of the machine, a later process with the same id, and one killed before its lock was there.
  const boot = existsSync("/etc/machine-id") ? [{ pid, boot: "an earlier one" }] : [];
  for (const changes of platform === "linux" ? [{ pid, start: "1" }, ...boot] : []) {
    plant(path, changes);
    (await takeLock(path, silent, 100)).close();
  }
  await writeFile(`${path}.lock.0123456789abcdef.0`, "{");
  (await takeLock(path, silent, 100)).close();
  t.notOk(existsSync(`${path}.lock.0123456789abcdef.0`));
});

t.test("another machine is not mistaken", async (t) => {
  const path = join(folder, "mistaken");
  const gone = spawnSync(process.execPath, ["-e", ""]).pid;
  for (const changes of [{ machine: "somewhere else" }, { namespace: "a container" }]) {
    plant(path, { pid: gone, host: "elsewhere", ...changes });
    await t.rejects(takeLock(path, silent, 100), {
      message: new RegExp(`process ${gone} on elsewhere .*or if it no longer runs, delete .*mistaken.lock`),
    });
    t.ok(existsSync(`${path}.lock`), "and left alone");
  }
  await rm(`${path}.lock`);
  // A lock of another kind is not interpreted.
  for (const text of ["", "{}", '{"pid":1,"token":"../../x"}']) {
    await writeFile(`${path}.lock`, text);
    await t.rejects(takeLock(path, silent, 100), { message: /names no process; if nothing is writing it, delete/ });
    await rm(`${path}.lock`);
  }
});

t.test("of many that find one dead lock, one at a time has it", async (t) => {
  const path = join(folder, "many");
  const gone = spawnSync(process.execPath, ["-e", ""]).pid;
  // Each process holds it several times; a second one inside would find the file of the first.
  const code = `import { takeLock } from ${module("files")}; import { closeSync, openSync, rmSync } from "node:fs";
    const path = ${JSON.stringify(path)};
    process.stdin.once("data", async () => {
      for (let i = 0; i < 5; i++) {
        const lock = await takeLock(path, () => {});
        closeSync(openSync(path + ".inside", "wx"));
        await new Promise((resolve) => setTimeout(resolve, 3));
        rmSync(path + ".inside");
        lock.close();
      }
      process.exit();
    });
    console.log("ready");`;
  for (let round = 0; round < (soak ? 3 : 1); round++) {
    plant(path, { pid: gone });
    const children = Array.from({ length: 6 }, () =>
      spawn(process.execPath, ["--input-type=module", "-e", code], { stdio: ["pipe", "pipe", "inherit"] }),
    );
    await Promise.all(children.map((child) => once(child.stdout, "data")));
    for (const child of children) child.stdin.write("go\n");
    const ends = await Promise.all(children.map((child) => once(child, "exit")));
    t.same(
      ends.map(([code]) => code),
      [0, 0, 0, 0, 0, 0],
    );
    t.same(
      (await readdir(folder)).filter((name) => name.startsWith("many")),
      [],
    );
  }
});

t.test("stopped while it writes: the target as it was, no lock, nothing half", async (t) => {
  const path = join(folder, "target");
  await writeFile(path, "as it was");
  const writing = `async function* chunks() { yield Buffer.from("new"); console.log("writing"); await new Promise((resolve) => setTimeout(resolve, 60_000)); }
    await writeWhole(path, chunks());`;
  for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) {
    const child = await holder(path, writing);
    const temporary = (): Promise<string[]> =>
      readdir(folder).then((names) => names.filter((name) => /^target\..*tmp$/.test(name)));
    while ((await temporary()).length === 0) await new Promise((resolve) => setTimeout(resolve, 20));
    child.kill(signal);
    const [, found] = await once(child, "exit");
    t.equal(found, signal, "it ends by the signal");
    t.same(
      (await readdir(folder)).filter((name) => name.startsWith("target")),
      ["target"],
    );
    t.equal(await readFile(path, "utf8"), "as it was");
  }
  const child = await holder(path, "process.exit(3);");
  if (child.exitCode === null) await once(child, "exit");
  t.notOk(existsSync(`${path}.lock`), "an exit leaves none");
});

t.test("a link and the file that it stands for are one file; its mode stays", async (t) => {
  const [path, link] = [join(folder, "real"), join(folder, "link")];
  await writeFile(path, "old");
  await chmod(path, 0o600);
  await symlink("real", link);
  const lock = await takeLock(link, silent);
  await t.rejects(takeLock(path, silent, 100), { message: /is being written by process/ });
  await writeWhole(link, [Buffer.from("new")]);
  lock.close();
  t.equal(await readFile(path, "utf8"), "new");
  t.equal((await stat(path)).mode & 0o777, 0o600);
});

t.test("files that belong together are all new or all old", async (t) => {
  const [a, b] = [join(folder, "a"), join(folder, "b")];
  await writeFile(a, "old");
  await t.rejects(
    writeTogether([
      [a, [Buffer.from("new")]],
      [join(folder, "no/such/folder"), [Buffer.from("new")]],
    ]),
    { tag: "source", file: join(folder, "no/such/folder"), message: /cannot be written/ },
  );
  t.equal(await readFile(a, "utf8"), "old");
  t.same(
    await writeTogether([
      [a, [Buffer.from("new")]],
      [b, [Buffer.from("also "), Buffer.from("new")]],
    ]),
    [3, 8],
  );
  t.equal(`${await readFile(a, "utf8")}, ${await readFile(b, "utf8")}`, "new, also new");
  t.same(
    (await readdir(folder)).filter((name) => name.endsWith(".tmp") && !name.startsWith("gone")),
    [],
  );
});

t.test("what is put aside lies in a file of nobody else's, and is gone afterwards", async (t) => {
  const own = join(folder, "aside");
  await mkdir(own);
  const scratch = openScratch(join(own, "p.eigen"));
  const parts = [9, 4, 1, 70_000].map((length, i) => new Uint8Array(length).fill(i + 1));
  t.same(await readdir(own), [], "no file before there is something");
  const reads = [];
  for (const part of parts) reads.push(await scratch.put(part));
  const [file, ...rest] = await readdir(own);
  t.match(file, /^p\.eigen\.[0-9a-f]{8}\.tmp$/);
  t.same(rest, []);
  if (process.platform !== "win32") t.equal((await stat(join(own, file!))).mode & 0o777, 0o600);
  for (const i of [3, 0, 2, 1]) t.strictSame(await reads[i]!(), parts[i]);
  await truncate(join(own, file!), 5);
  await t.rejects(reads[3]!(), { name: "SourceError", message: /p\.eigen.*cannot be read.*shorter/ });
  scratch.close();
  t.same(await readdir(own), []);
  const nowhere = openScratch(join(folder, "nowhere", "p.eigen"));
  await t.rejects(nowhere.put(parts[0]!), { name: "SourceError", message: /cannot be written/ });
  nowhere.close();
});
