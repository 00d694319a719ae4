/**
 * The viewer of packs: its page in Chromium and Firefox, and the command view, which serves it. Skipped by name without
 * a browser, unless EIGENLORA_REQUIRE lists chromium, firefox.
 */
import { spawn } from "node:child_process";
import { once } from "node:events";
import { readFile, writeFile } from "node:fs/promises";
import { createServer as createHttpServer, get } from "node:http";
import { createServer } from "node:net";
import { createInterface } from "node:readline";
import { pathToFileURL } from "node:url";
import { openPack } from "eigenlora";
import { buildPack, encodeTaskFile, readTaskFile } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import type { Page } from "playwright-core";
import t, { type Test } from "tap";
import { launch, noChromium, visitorOf } from "../support/browser.ts";
import { json, run } from "../support/command-line.ts";
import { fromRoot, workIn } from "../support/folder.ts";
import { concat, data, LOSSLESS, packOf } from "../support/packs.ts";
import { axeFindsNothing } from "../support/page-axe.ts";
import { serve } from "../support/range-server.ts";

const main = fromRoot("dist/src/cli/main.js");
const viewer = fromRoot("dist/viewer.html");
const demo = fromRoot("examples/tasks.eigen");
const home = fromRoot("docs/site/home.md");

workIn(t);
/** Large: without loss, in f32; signed. */
await writeFile("large.eigen", (await packOf(["adapters/own-seed"], LOSSLESS)).bytes);
await run("keygen", "-o", "me");
await run("sign", "large.eigen", "--key", "me.pem");
const inBrowser = { skip: noChromium };
const browser = noChromium ? undefined! : await launch(t);

/** Runs the command until the test ends. @returns the address that it prints, and its end by Ctrl-C */
async function view(t: Test, ...files: string[]): Promise<{ url: string; end(): Promise<number | null> }> {
  const child = spawn(process.execPath, [main, "view", ...files, "--no-open", "--json"], {
    stdio: ["ignore", "pipe", "inherit"],
  });
  t.teardown(() => void child.kill("SIGKILL"));
  for await (const line of createInterface({ input: child.stdout })) {
    const end = async (): Promise<number | null> => {
      const ended = once(child, "exit");
      child.kill("SIGINT");
      return (await ended)[0];
    };
    return { url: JSON.parse(line).url, end };
  }
  throw new Error("it printed nothing");
}

/** Opens a page, and collects what it complains of and whom it asks. */
async function visit(t: Test, url: string): Promise<{ page: Page; complaints: string[]; asked: string[] }> {
  const { page, complaints } = await visitorOf(browser, { viewport: { width: 1280, height: 900 } });
  t.teardown(() => page.close());
  const asked: string[] = [];
  page.on("request", (request) => asked.push(request.url()));
  await page.goto(url);
  await settled(page);
  return { page, complaints, asked };
}

const settled = (page: Page): Promise<void> => page.locator('body[aria-busy="false"]').waitFor();
const sectionOf = (page: Page, title: string) =>
  page.locator("section", { has: page.getByRole("heading", { name: title }) });
const factOf = (page: Page, name: string) =>
  page.locator("dl div", { has: page.locator("dt", { hasText: new RegExp(`^${name}$`) }) }).locator("dd");
const readSoFar = async (page: Page): Promise<string> => (await page.locator('[data-part="reads"]').textContent())!;

t.test("the command serves its page and the named files alone, until Ctrl-C", async (t) => {
  const { url, end } = await view(t, "large.eigen", demo);
  const { origin, searchParams } = new URL(url);
  const [first] = searchParams.getAll("url");
  const page = await fetch(origin);
  t.match(page.headers.get("content-security-policy"), /connect-src 'self'; frame-ancestors 'none'/);
  t.equal(await page.text(), await readFile(viewer, "utf8"));
  const bytes = await readFile("large.eigen");
  const part = await fetch(origin + first, { headers: { range: "bytes=10-19" } });
  t.same([part.status, part.headers.get("content-range")], [206, `bytes 10-19/${bytes.length}`]);
  t.same(Buffer.from(await part.arrayBuffer()), bytes.subarray(10, 20));
  t.same(Buffer.from(await (await fetch(origin + first)).arrayBuffer()), bytes, "and whole");
  for (const [status, path, init] of [
    [404, "/files/3/large.eigen"],
    [404, "/files/1/me.pem"],
    [404, "/files/1/../../me.pem"],
    [405, "/", { method: "POST" }],
    [416, first, { headers: { range: `bytes=${bytes.length}-` } }],
  ] as const)
    t.equal((await fetch(origin + path, init)).status, status, `${path}`);
  // A page of another site that has its name lead here.
  const [stranger] = await once(get(origin, { headers: { host: "evil.example" } }), "response");
  t.equal(stranger.statusCode, 403);
  stranger.resume();
  t.equal(await end(), 0);
});

t.test("what cannot be shown is said before a browser opens", async (t) => {
  const taken = createServer().listen(0, "127.0.0.1");
  await once(taken, "listening");
  t.teardown(() => taken.close());
  const { port } = taken.address() as { port: number };
  await writeFile("notes.eigen", "{}");
  for (const [args, status, message] of [
    [["missing.eigen"], 1, /missing\.eigen: cannot be opened/],
    [["notes.eigen"], 1, /this is JSON, expected an EigenLoRA pack/],
    [[data("adapters/own-seed")], 1, /holds 20 adapters; name one: /],
    [[demo, "--port", "70000"], 2, /--port 70000: .*65535/],
    [[demo, "--port", `${port}`], 2, /leave it out to take a free one/],
  ] as const) {
    const { error } = await json(status, "view", ...args, "--no-open");
    t.match(error.message, message);
  }
});

t.test("a large pack is read by what is looked at", inBrowser, async (t) => {
  const { url } = await view(t, "large.eigen");
  const pack = await openPack(await readFile("large.eigen"));
  const { page, complaints, asked } = await visit(t, url);
  const { directoryLength, committed } = pack.window.superblock;
  const kB = (n: number): string => `${(n / 1e3).toFixed(n < 1e4 ? 2 : 1)} kB`;
  t.equal(
    await readSoFar(page),
    `Read so far: ${kB(1536 + directoryLength)} of ${(committed / 1e6).toFixed(2)} MB, in 2 requests.`,
    "the window and the directory",
  );
  await factOf(page, "root")
    .getByText(await pack.integrity())
    .waitFor();
  await factOf(page, "signature")
    .getByText(/^by ed25519:\S+, and it is right/)
    .waitFor();
  const tasks = [...pack.tasks.values()];
  t.same(
    await sectionOf(page, "Tasks").locator("tbody th").allTextContents(),
    tasks.map(({ id }) => id),
  );
  const { id, bytes, integrity, metadata } = tasks[3]!;
  const [button, details] = [page.getByRole("button", { name: id, exact: true }), page.locator(".task")];
  await button.press("Enter");
  await page.locator('[data-part="reads"]', { hasText: "in 3 requests" }).waitFor();
  t.match(await readSoFar(page), kB(1536 + directoryLength + bytes), "and the task that was chosen");
  t.match(await details.textContent(), integrity!);
  t.match(await details.textContent(), metadata.labels!.join(", "));
  await page.getByRole("button", { name: /^Read the components/ }).click();
  await page.locator("figure", { hasText: "Components of A, the mean last, f32" }).waitFor();
  t.match(
    await sectionOf(page, "What is shared").locator(".caption").textContent(),
    /^1 of 20 tasks read; 1 task takes/,
  );
  await page.getByRole("button", { name: /^Read all tasks/ }).click();
  await page.locator(".caption", { hasText: "20 tasks take shared components" }).waitFor();
  const shares = await sectionOf(page, "What is shared").locator("tbody tr:first-child td").allTextContents();
  t.same(shares.slice(-3), ["20", "20", "0"], "of the first module all take both factors");
  await page.getByRole("button", { name: /^Check every byte/ }).click();
  await page.getByText("Components and 20 tasks are whole: they have the hashes that the directory names.").waitFor();
  t.same(
    asked.filter((one) => !one.startsWith(new URL(url).origin) && !one.startsWith("data:")),
    [],
    "nobody else is asked",
  );
  t.same(complaints, []);
});

t.test("axe finds nothing, and phones need no scrolling sideways", inBrowser, async (t) => {
  const { url } = await view(t, demo);
  const { page } = await visit(t, url);
  await page.locator("figure canvas").first().waitFor();
  await page.getByRole("button", { name: /^Compare the tasks/ }).click();
  await page.locator("rect").first().waitFor();
  await page.locator("summary").click();
  await axeFindsNothing(t, page);
  t.equal(await page.evaluate("document.documentElement.scrollWidth"), 390);
});

/** A task with markup in all of its texts, and one whose bytes are damaged. */
async function hostilePack(): Promise<{ bytes: Uint8Array<ArrayBuffer>; id: string }> {
  const id = `<img src=x onerror="document.title='taken'">`;
  const adapters = await readAdapters([data("adapters/own-seed/debtags-role"), data("adapters/own-seed/sections-0")]);
  const origin = "</script><script>document.title='taken'</script>\u202egpj.exe";
  const [first, second] = adapters;
  const given = [{ ...first!, id, metadata: { ...first!.metadata, origin } }, second!];
  const bytes = concat((await buildPack(given)).chunks);
  const { section } = (await openPack(bytes)).directory.tasks.find((task) => task.id === second!.id)!;
  bytes[section.offset + section.length - 1]! ^= 1;
  return { bytes, id };
}

t.test("from a disk: files that are chosen, hostile and wrong ones, and a task file", inBrowser, async (t) => {
  const { page, complaints, asked } = await visit(t, pathToFileURL(viewer).href);
  const { bytes, id } = await hostilePack();
  const choose = async (...files: { name: string; bytes: Uint8Array }[]): Promise<void> => {
    const given = files.map(({ name, bytes }) => ({ name, mimeType: "", buffer: Buffer.from(bytes) }));
    await page.locator("#choice").setInputFiles(given);
    await page.locator("#status:empty").waitFor();
    await settled(page);
  };
  await choose({ name: "<b>hostile</b>.eigen", bytes });
  await page.locator(".task h4", { hasText: id }).waitFor();
  t.match(await page.locator(".task").textContent(), "\\u202egpj.exe", "the turn of direction is spelt out");
  t.equal(await page.locator("article img, article b, article script").count(), 0);
  t.match(await page.title(), "<b>hostile</b>.eigen");
  await page.locator(".caption", { hasText: /^1 of 2 tasks read/ }).waitFor();
  await page.getByRole("button", { name: /^Check every byte/ }).click();
  await page.locator(".work .wrong", { hasText: /1 part wrong: .*task "sections-0": .*checksum/ }).waitFor();

  const failure = page.locator("#failure");
  const safetensors = await readFile(data("adapters/own-seed/debtags-role/adapter_model.safetensors"));
  await choose({ name: "tasks.eigen", bytes: safetensors });
  t.match(await failure.textContent(), "tasks.eigen, window: this is a safetensors file, expected an EigenLoRA pack");
  await choose({ name: "adapter_model.safetensors", bytes: safetensors });
  t.match(await failure.textContent(), "give adapter_config.json with it");
  await choose({ name: "tasks.eigen", bytes: (await readFile(demo)).subarray(0, 5000) });
  t.match(await failure.textContent(), /ends at byte 5000|truncated/);
  t.equal(await page.locator("article").count(), 1, "the page stays as it was");

  await page.getByRole("button", { name: "Close <b>hostile</b>.eigen" }).click();
  const pack = await openPack(await readFile(demo));
  const [blob, { metadata }] = [await pack.stored("debtags-use"), pack.tasks.get("debtags-use")!];
  const file = encodeTaskFile({ id: "debtags-use", adapterBytes: 0, metadata }, pack.basisId, blob);
  t.match(await readTaskFile(file), { id: "debtags-use", basisId: pack.basisId, metadata, blob });
  await choose({ name: "mine.eigentask", bytes: file });
  t.equal(await factOf(page, "basis").textContent(), pack.basisId);
  await choose({ name: "tasks.eigen", bytes: await readFile(demo) });
  t.equal(await page.locator("article").count(), 1, "its pack takes it");
  await page.getByRole("button", { name: "debtags-use, of mine.eigentask", exact: true }).click();
  await page.locator(".task h4", { hasText: "of mine.eigentask" }).waitFor();
  t.same(complaints, []);
  t.same(
    asked.filter((one) => /^https?:/.test(one)),
    [],
    "no request at all",
  );
});

t.test("an address: without permission, without ranges, without an answer", inBrowser, async (t) => {
  const page = await readFile(viewer);
  const [here, there] = [
    await serve(
      new Map([
        ["viewer.html", page],
        ["tasks.eigen", await readFile(demo)],
      ]),
    ),
    await serve(new Map([["tasks.eigen", await readFile(demo)]])),
  ];
  t.teardown(() => Promise.all([here.close(), there.close()]));
  const failureAt = async (address: string): Promise<string> => {
    const { page } = await visit(t, `${here.url("viewer.html")}?url=${encodeURIComponent(address)}`);
    return (await page.locator("#failure").textContent())!;
  };
  t.match(
    await failureAt(there.url("tasks.eigen")),
    /does not let http:.* read it \(header Access-Control-Allow-Origin\)/,
  );
  t.match(await failureAt("nothing.eigen"), /answered 404; check the address/);
  t.match(await failureAt("viewer.html"), /answered an HTML page/);
  const { page: good } = await visit(t, `${here.url("viewer.html")}?url=tasks.eigen`);
  t.match(await factOf(good, "holds").textContent(), "20 tasks over 12 modules");
  t.ok(here.ranges.length > 2, "by ranges");
  const plain = createHttpServer(async ({ url }, response) => {
    const name = url!.startsWith("/tasks") ? demo : viewer;
    response.writeHead(200, name === viewer ? { "content-type": "text/html" } : {}).end(await readFile(name));
  });
  await once(plain.listen(0, "127.0.0.1"), "listening");
  t.teardown(() => plain.close());
  const { page: whole } = await visit(
    t,
    `http://127.0.0.1:${(plain.address() as { port: number }).port}/?url=tasks.eigen`,
  );
  await whole.getByText("Read whole (102.7 kB), since its server has no ranges.").waitFor();
});

t.test("the site's first page shows a pack in a frame", inBrowser, async (t) => {
  const [frame] = /<iframe[^>]*><\/iframe>/.exec(await readFile(home, "utf8"))!;
  const files = { "viewer.html": await readFile(viewer), "tasks.eigen": await readFile(demo) };
  const host = await serve(new Map(Object.entries({ ...files, "index.html": Buffer.from(`<!doctype html>${frame}`) })));
  t.teardown(() => host.close());
  const page = await browser.newPage();
  t.teardown(() => page.close());
  await page.goto(host.url("index.html"));
  await page.frameLocator("iframe").getByText("20 tasks over 12 modules").waitFor();
  t.pass("the pack of the demo, in the viewer");
});
