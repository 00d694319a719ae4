/**
 * Teaching in the visitors' page: built, served, in a real Chromium on WASM, from a handful of examples. Software
 * WebGPU takes minutes for it: learn-chromium.test.ts trains a smaller model there.
 */
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { openPack } from "eigenlora";
import type { Browser, Page } from "playwright-core";
import t from "tap";
import { createEncoder, model } from "../../examples/minilm.js";
import { buildPage } from "../../examples/page/build.js";
import { serveFolder } from "../../examples/page/serve.js";
import { size } from "../../examples/page/views.js";
import { launch, noChromium, settled, visitorOf } from "../support/browser.ts";
import { folderFor } from "../support/folder.ts";
import { parseTaskFile } from "../support/internals/runtime.ts";
import { keepTasks } from "../support/page-pack.ts";
import { NODE, open } from "../support/sessions.ts";

const skip = noChromium;

const folder = folderFor(t);
await buildPage(folder);
const TASKS = ["debtags-admin", "debtags-game", "debtags-role", "sections-0"];
await keepTasks(folder, TASKS);
const server = await serveFolder(folder);
t.teardown(() => server.close());

/** Shared by both tests: each opens a window of its own. */
const browser = skip ? undefined! : await launch(t);

/** Messages that the page has received from its worker, newest last. */
interface Heard {
  probabilities: number[][];
  losses: number[];
}

/** Opens the page and listens to its worker's messages: the page itself shows rounded numbers. */
async function visit(
  url = server.url,
  options: Parameters<Browser["newPage"]>[0] = {},
): Promise<{ page: Page; complaints: string[] }> {
  const { page, complaints } = await visitorOf(browser, options);
  await page.addInitScript(() => {
    const heard: Heard = { probabilities: [], losses: [] };
    Object.assign(globalThis, { heard });
    globalThis.Worker = class extends Worker {
      constructor(...given: ConstructorParameters<typeof Worker>) {
        super(...given);
        this.addEventListener("message", ({ data: { event, detail, value } }) => {
          if (event === "step") heard.losses.push(detail.loss);
          if (value?.probabilities) heard.probabilities.push(value.probabilities);
        });
      }
    };
  });
  await page.goto(url);
  await settled(page);
  return { page, complaints };
}

const heard = (page: Page): Promise<Heard> => page.evaluate(() => (globalThis as unknown as { heard: Heard }).heard);
const note = (page: Page, text: RegExp): Promise<void> => page.locator("#teach-note", { hasText: text }).waitFor();
const press = (page: Page, what: "Teach" | "Stop"): Promise<void> =>
  page.locator("#teach-button", { hasText: what }).click();

async function type(page: Page, text: string): Promise<number[]> {
  await page.locator("#sentence").fill(text);
  await settled(page);
  return (await heard(page)).probabilities.at(-1)!;
}

/** Replaces labels and examples in the form. */
async function write(page: Page, lessons: readonly (readonly [label: string, examples: string])[]): Promise<void> {
  for (const [i, [label, examples]] of lessons.entries()) {
    const lesson = page.locator(".lesson").nth(i);
    await lesson.locator("input").fill(label);
    await lesson.locator("textarea").fill(examples);
  }
}

t.test("teaches a task that answers beside the others, and leaves as a file", { skip, timeout: 240_000 }, async (t) => {
  const { page, complaints } = await visit();
  await press(page, "Teach");
  // Any step but the first and the last: a single one may pass between two looks.
  await page.locator("#teach-step", { hasText: /^Step ([2-9]|1\d) of/ }).waitFor();
  t.ok((await type(page, "shows the planets")).length > 2, "a task of the pack answers meanwhile");
  await note(page, /^Learned in .*: sky-or-lab is a task of [\d.]+ k?B\./);
  await settled(page);

  const { losses } = await heard(page);
  t.ok(losses.at(-1)! < losses[0]! / 3, `loss ${losses[0]} → ${losses.at(-1)}`);
  t.equal(
    (await page.locator("#loss polyline").getAttribute("points"))!.split(" ").length,
    losses.length,
    "each step is drawn",
  );
  t.equal(await page.locator("#active-name").textContent(), "sky-or-lab");
  t.same(await page.locator("#labels .name").allTextContents(), ["astronomy", "chemistry"]);
  t.equal(await page.locator(".card").count(), TASKS.length + 1);
  t.equal(await page.locator(".card .said b:empty").count(), 0, "all tasks answer the sentence");

  const sentences = [
    "finds comets and asteroids in the sky",
    "models of atoms, bonds and molecules",
    "a text with no word about either",
  ];
  const inPage: number[][] = [];
  for (const sentence of sentences) inPage.push(await type(page, sentence));
  t.ok(inPage[0]![0]! > 0.8 && inPage[1]![1]! > 0.8, `it has learned: ${inPage}`);
  const said = page.locator('.card[data-task="sky-or-lab"] .said');

  t.test("the address carries it to another visitor, who checks it", async (t) => {
    const link = page.url();
    t.match(link, /#take=sky-or-lab\/[\w-]+$/);
    const { page: theirs } = await visit(link);
    t.equal(await theirs.locator("#active-name").textContent(), "sky-or-lab");
    t.same(await type(theirs, sentences[2]!), inPage[2], "the same numbers");
    const [before, changed] = [link.slice(0, -20), link.at(-20) === "A" ? "B" : "A"];
    const damaged = "It is not a task, or it was damaged";
    for (const [name, url, expected] of [
      ["changed", `${before}${changed}${link.slice(-19)}`, damaged],
      ["cut", before, damaged],
      ["nothing", `${server.url}#take=sky-or-lab/%%`, damaged],
      ["game", link, "There is a task called game already"],
    ] as const) {
      await theirs.evaluate((to) => void (location.href = to), url.replace("=sky-or-lab/", `=${name}/`));
      await note(theirs, new RegExp(`^${name}\\.eigentask was not opened\\. ${expected}`));
      await settled(theirs);
      t.equal(await theirs.locator("#active-name").textContent(), "sky-or-lab", name);
    }
    await theirs.close();
  });

  t.test("its file answers alike in Node", async (t) => {
    const download = page.waitForEvent("download");
    await page.locator("#download").click();
    const file = await download;
    t.equal(file.suggestedFilename(), "sky-or-lab.eigentask");
    const bytes = new Uint8Array(await readFile(await file.path()));
    t.match(await page.locator("#download").textContent(), size(bytes.length));
    t.equal(parseTaskFile(bytes, "sky-or-lab.eigentask").id, "sky-or-lab");
    const pack = await openPack(join(folder, "tasks.eigen"));
    const session = await open(NODE, model, pack);
    t.teardown(async () => (await session.close(), pack.close()));
    await session.addTask("sky", bytes);
    t.same(session.tasks.get("sky")!.metadata.labels, ["astronomy", "chemistry"]);
    await session.switchTask("sky");
    const encode = await createEncoder(NODE);
    for (const [i, sentence] of sentences.entries()) {
      const [first, second] = (await session.run(encode([sentence]) as never)).logits!.data as Float32Array;
      const probability = 1 / (1 + Math.exp(second! - first!));
      t.ok(
        Math.abs(probability - inPage[i]![0]!) < 1e-4,
        `${sentence}: ${probability} in Node, ${inPage[i]} in the page`,
      );
    }

    await page
      .locator("#task-file")
      .setInputFiles({ name: "theirs.eigentask", mimeType: "", buffer: Buffer.from(bytes) });
    await note(page, /^theirs is open/);
    await settled(page);
    t.equal(await page.locator("#active-name").textContent(), "theirs");
    t.same((await heard(page)).probabilities.at(-1), inPage[2], "opened again, it gives the same numbers");
    t.equal(await page.locator('.card[data-task="theirs"] .said').textContent(), await said.textContent());
    const wrong = [
      [
        "x.eigentask",
        bytes.with(200, bytes[200]! ^ 1),
        /It is not a task, or it was damaged.* x\.eigentask, task file: its checksum/,
      ],
      ["notes.txt", new TextEncoder().encode("hello"), /It is not a task, or it was damaged/],
      ["theirs.eigentask", bytes, /There is a task called theirs already\./],
      ["game.eigentask", bytes, /There is a task called game already\./],
    ] as const;
    for (const [name, buffer, expected] of wrong) {
      await page.locator("#task-file").setInputFiles({ name, mimeType: "", buffer: Buffer.from(buffer) });
      await note(page, new RegExp(`^${name.replace(".", "\\.")} was not opened\\. `));
      t.match(await page.locator("#teach-note").textContent(), expected);
      t.notMatch(await page.locator("#teach-note").textContent(), /Uint8Array/);
    }
    t.equal(await page.locator("#active-name").textContent(), "theirs");
  });

  t.test("what cannot be learned from is said at once", async (t) => {
    const said = (): Promise<string | null> => page.locator("#teach-note").textContent();
    const tries = [
      ["one", "a line", "two", "  \n", "The label two has no examples. Write a line or more for it."],
      ["one", "a line", "one", "another line", "Two labels are called one. Give each its own name."],
      ["one", "a line", " ", "another line", "A label has no name. Give it one, or remove it."],
    ] as const;
    for (const [first, its, second, others, expected] of tries) {
      await write(page, [
        [first, its],
        [second, others],
      ]);
      await press(page, "Teach");
      t.equal(await said(), expected, "before anything is got ready");
      t.ok(await page.locator("#teach-note.wrong").isVisible());
    }
    await write(page, [
      ["one", "a line"],
      ["two", "another line"],
    ]);
    for (const name of ["debtags-game", "Game", "sections-0"]) {
      await page.locator("#task-name").fill(name);
      const expected = `There is a task called ${name} already. Choose another name.`;
      t.equal(await said(), expected, "as it is typed");
      t.equal(await page.locator("#task-name").getAttribute("aria-invalid"), "true");
      await press(page, "Teach");
      t.equal(await said(), expected);
      t.equal(await page.locator("#teach-button").textContent(), "Teach");
    }
    await page.locator("#task-name").fill("sky-or-lab");
    t.equal(await said(), "", "what was taught before may be taught again");
    await page.locator(".remove").last().click();
    await press(page, "Teach");
    t.equal(await said(), "A task needs two labels or more. Add a label.");
    await page.locator("#add-label").click();
    await press(page, "Teach");
    t.equal(
      await page.locator(".lesson input:invalid").count(),
      1,
      "a label without a name is the browser's to refuse",
    );
  });

  t.same(complaints, []);
});
