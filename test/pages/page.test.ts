import { readFile } from "node:fs/promises";
import { join } from "node:path";
import type { Browser, Page } from "playwright-core";
import t from "tap";
import { buildPage } from "../../examples/page/build.js";
import { type Answered, serveFolder } from "../../examples/page/serve.js";
import { launch, noChromium, settled, visitorOf } from "../support/browser.ts";
import { folderFor } from "../support/folder.ts";
import { axeFindsNothing } from "../support/page-axe.ts";
import { soak } from "../support/required.ts";

/**
 * The page as visitors get it: built, served by its own server, in a real Chromium. Skipped by name without one; fails
 * when EIGENLORA_REQUIRE lists chromium.
 */
const skip = noChromium;

const folder = folderFor(t);
const answers: Answered[] = [];
await buildPage(folder);
const server = await serveFolder(folder, { onAnswer: (answered) => answers.push(answered) });
t.teardown(() => server.close());

const data = async (path: string): Promise<any> =>
  JSON.parse(await readFile(new URL(`../data/${path}`, import.meta.url), "utf8"));
/** Shared by all tests here: each opens a window of its own. */
const browser = skip ? undefined! : await launch(t, ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"]);

const packReads = (): Answered[] => answers.filter(({ path }) => path === "/tasks.eigen");

/** A page without its service worker, which would read the whole pack once more. */
const newPage = (options: Parameters<Browser["newPage"]>[0] = {}) =>
  visitorOf(browser, { serviceWorkers: "block", ...options });

/** Opens the page, and collects its complaints. */
async function visit(
  options: Parameters<Browser["newPage"]>[0] = {},
  url = server.url,
): Promise<{ page: Page; complaints: string[] }> {
  const { page, complaints } = await newPage(options);
  await page.addInitScript(() => {
    const window = globalThis as unknown as { shift: number };
    window.shift = 0;
    new PerformanceObserver((list) => {
      for (const entry of list.getEntries()) window.shift += (entry as unknown as { value: number }).value;
    }).observe({ type: "layout-shift", buffered: true });
  });
  await page.goto(url);
  return { page, complaints };
}

const labelsOf = (page: Page): Promise<string[]> => page.locator("#labels .name").allTextContents();
const topOf = async (page: Page): Promise<string | null> => page.locator("#labels .top .name").textContent();
/** The newest row of the log: what, time, requests, bytes. */
const lastCost = (page: Page): Promise<string[]> => page.locator("#log tr").first().locator("td").allTextContents();
const cardOf = (page: Page, task: string) => page.locator(`.card[data-task="${task}"]`);

async function choose(page: Page, task: string): Promise<void> {
  await cardOf(page, task).click();
  await page.locator("#log tr:first-child", { hasText: task }).waitFor();
  await settled(page);
}

async function type(page: Page, text: string): Promise<void> {
  await page.locator("#sentence").fill(text);
  await settled(page);
}

/** Layout shift while the page loaded. */
const shiftOf = (page: Page): Promise<number> =>
  page.evaluate(() => (globalThis as unknown as { shift: number }).shift);

/** Texts that do not fit into their element. */
const cutOff = (page: Page): Promise<string[]> =>
  page.evaluate(() =>
    Array.from(document.querySelectorAll<HTMLElement>("body *:not(.hidden)"))
      .filter((one) => one.matches(".head, .said") || getComputedStyle(one).overflowX !== "visible")
      .filter((one) => one.scrollWidth > one.clientWidth + 1)
      .map(({ textContent }) => textContent),
  );

t.test("sentence, tasks and their cost", { skip }, async (t) => {
  const { page, complaints } = await visit({ viewport: { width: 1280, height: 800 } });
  await settled(page);
  t.ok((await shiftOf(page)) < 0.001, "nothing moves while it loads");
  t.match(
    await page.locator("#cold").textContent(),
    /^Cold start: 3 requests/,
    "window, directory with bases, one task",
  );
  const [what, , requests] = await lastCost(page);
  t.same([what, requests], ["19 tasks ahead", "19"], "then the others");
  t.equal(packReads().length, 22);
  t.ok(
    packReads().every(({ status, range }) => status === 206 && range),
    "all of them ranges",
  );
  t.equal(await page.locator(".card").count(), 20);
  t.match(await page.locator("#promise").textContent(), /^20 tasks of [\d.]+ kB each$/);
  t.match(await page.locator("#weights .ours").first().textContent(), /all 20/);

  t.test("the first sentence is answered by all tasks, and rightly by all that Debian has a label for", async (t) => {
    const { first } = JSON.parse(await readFile(join(folder, "facts.json"), "utf8"));
    const ids = await page
      .locator(".card")
      .evaluateAll((cards) => cards.map((card) => (card as HTMLElement).dataset["task"]!));
    t.equal(await page.locator("#sentence").inputValue(), first.text);
    t.equal(await page.locator("#truth").textContent(), `Debian says: ${Object.values(first.labels).join(", ")}`);
    let inATestSet = false;
    for (const task of ids) {
      const { labels, train, test } = await data(`tasks/${task}.json`);
      const said = await cardOf(page, task).locator(".said b").textContent();
      t.ok(labels.includes(said), `${task}: ${said}`);
      if (task in first.labels) t.equal(said, first.labels[task], task);
      t.equal(await cardOf(page, task).locator(".mark").textContent(), task in first.labels ? "✓" : "", task);
      t.notOk(
        train.some(([text]: [string]) => text === first.text),
        `${task} was not trained on it`,
      );
      inATestSet ||= test.some(([text]: [string]) => text === first.text);
    }
    t.ok(inATestSet);
    t.match(await page.locator("#tasks-note").textContent(), /^19 answers in .*; Debian agrees with 6 of 6$/);
    await page.locator("#status", { hasText: "debtags-admin says monitoring, " }).waitFor({ state: "attached" });
  });

  t.test("axe finds nothing", async (t) => {
    await axeFindsNothing(t, page);
    await page.setViewportSize({ width: 1280, height: 800 });
  });

  t.test("a click switches, reads nothing again, and its own labels answer", async (t) => {
    const { labels } = await data("tasks/debtags-made-of.json");
    await choose(page, "debtags-made-of");
    t.same(await labelsOf(page), labels);
    t.same((await lastCost(page)).slice(2), ["0", "0 B"]);
    t.equal(await page.locator("#switch-bytes").textContent(), "0 B");
    t.equal(packReads().length, 22);
  });

  t.test("predictions are PEFT's", async (t) => {
    const reference = (await data("reference/predictions.json"))["own-seed"];
    // Rows whose first label is far ahead, so that the losses of a lossy pack do not matter.
    for (const [task, rows] of [
      ["debtags-made-of", soak ? [0, 1] : [0]],
      ["debtags-implemented-in", soak ? [7, 30] : [7]],
    ] as const) {
      const { labels, test } = await data(`tasks/${task}.json`);
      await choose(page, task);
      for (const row of rows) {
        await type(page, test[row][0]);
        const expected = labels[reference[task].predictions[row]];
        t.equal(await topOf(page), expected, `${task}: ${test[row][0]}`);
        t.equal(
          await cardOf(page, task).locator(".said b").textContent(),
          expected,
          "the same in a batch of several tasks",
        );
      }
    }
  });

  t.test("a line from the test set, with what Debian says; no sentence, no answer", async (t) => {
    await page.locator("#example").click();
    await settled(page);
    const { labels, test } = await data("tasks/debtags-implemented-in.json");
    const [text, label] = test[0];
    t.equal(await page.locator("#sentence").inputValue(), text);
    t.equal(await page.locator("#truth").textContent(), `Debian says: ${labels[label]}`);
    const said = await cardOf(page, "debtags-implemented-in").locator(".said b").textContent();
    const mark = page.locator(".card .mark:not(:empty)");
    t.same(await mark.allTextContents(), [said === labels[label] ? "✓" : "✗"], "a mark where it is known");
    for (const nothing of ["", "  "]) {
      await type(page, nothing);
      t.equal(await page.locator(".card .said b:not(:empty)").count(), 0);
      t.equal((await page.locator("#labels .value").allTextContents()).join(""), "");
      const hint = "Write a few words about a program, and all tasks answer.";
      t.equal(await page.locator("#truth").textContent(), hint);
      await page.locator("#status", { hasText: hint }).waitFor({ state: "attached" });
    }
    await type(page, "a game");
    t.equal(await page.locator(".card .said b:empty").count(), 0, "and all answer again");
  });

  t.test("keys", async (t) => {
    await page.locator("#sentence").press("Escape");
    const active = (): Promise<string> => page.locator("#cards :checked").inputValue();
    t.equal(await active(), "debtags-implemented-in");
    const next = async (keys: string[], task: string): Promise<void> => {
      for (const key of keys) await page.keyboard.press(key);
      await page.locator("#log tr:first-child", { hasText: task }).waitFor();
      await settled(page);
      t.equal(await active(), task, keys.join(" "));
      t.same(await labelsOf(page), (await data(`tasks/${task}.json`)).labels);
      t.ok(
        await cardOf(page, task)
          .locator("input")
          .evaluate((input) => input === document.activeElement),
        "focused",
      );
    };
    await next(["ArrowRight"], "debtags-interface");
    await next(["1", "2"], "debtags-security");
    await page.waitForTimeout(750);
    await next(["u", "s"], "debtags-use");
    await page.waitForTimeout(750);
    await next(["1", "7"], "sections-0");

    await page.evaluate(() => (document.activeElement as HTMLElement).blur());
    await next(["ArrowLeft"], "debtags-works-with");
    await page.evaluate(() => (document.activeElement as HTMLElement).blur());
    await next(["1", "7"], "sections-0");
    await page.evaluate(() => (document.activeElement as HTMLElement).blur());
    await page.locator("#keys").uncheck();
    await page.waitForTimeout(750);
    await page.keyboard.press("3");
    t.equal(await active(), "sections-0", "who speaks to the browser turns them off");
    await page.locator("#keys").check();

    const reached = new Set<string>();
    await page.locator('#providers [value="wasm"]').focus();
    for (let presses = 0; presses < 25; presses++) {
      const at = await page.evaluate(() => {
        const { id, value = "", className, tagName } = document.activeElement as HTMLInputElement;
        return id || (tagName === "INPUT" ? value : className) || tagName;
      });
      reached.add(at);
      await page.keyboard.press("Tab");
    }
    const expected =
      "wasm theme sentence example keys sections-0 strength task-file astronomy remove task-name teach-button add-label";
    t.same(
      expected.split(" ").filter((one) => !reached.has(one)),
      [],
      `Tab reaches everything: ${[...reached].join(" ")}`,
    );
    await page.locator("#strength").focus();
    await page.keyboard.press("1");
    await settled(page);
    t.equal(await active(), "sections-0", "letters and figures choose among the cards only");
  });

  t.test("strength", async (t) => {
    await choose(page, "debtags-made-of");
    await type(page, "Irish (Gaeilge) dictionary words for /usr/share/dict");
    const top = page.locator("#labels .top .value");
    const full = Number.parseInt((await top.textContent())!, 10);
    await page.locator("#strength").fill("0.2");
    await page.locator("#log tr:first-child", { hasText: "at 20 %" }).waitFor();
    await settled(page);
    t.ok(Number.parseInt((await top.textContent())!, 10) < full, "less of the task, less sure");
  });

  t.same(complaints, []);
});

t.test("names at once; a task picked while the model loads answers first", { skip }, async (t) => {
  const { page } = await newPage();
  let letIn = (): void => {};
  const waiting = new Promise<void>((resolve) => (letIn = resolve));
  await page.route("**/model_fp16.onnx", async (route) => {
    await waiting;
    await route.continue();
  });
  await page.goto(server.url);
  await cardOf(page, "debtags-game").click();
  t.equal(await page.locator(".card").count(), 20);
  t.match(await page.locator("#promise").textContent(), /^20 tasks of [\d.]+ kB each$/);
  letIn();
  await settled(page);
  t.equal(await page.locator("#active-name").textContent(), "game");
  t.match(await page.locator("#switch-time").textContent(), / ms$/);
  await page.close();
});

t.test("a phone, in the dark, without motion", { skip }, async (t) => {
  const options = {
    viewport: { width: 390, height: 844 },
    colorScheme: "dark",
    reducedMotion: "reduce",
    hasTouch: true,
  } as const;
  const { page, complaints } = await visit(options);
  const width = (): Promise<number> => page.evaluate(() => document.documentElement.scrollWidth);
  const endOf = (selector: string): Promise<number> =>
    page.locator(selector).evaluate((one) => one.getBoundingClientRect().bottom + scrollY);
  t.equal(await width(), 390, "while it loads");
  await settled(page);
  t.ok((await shiftOf(page)) < 0.001, `nothing moves while it loads: ${await shiftOf(page)}`);
  t.ok((await endOf("#labels .top")) < 844, "the first answer is on the first screen");
  t.ok((await endOf("#cards")) < 2 * 844, "those of all tasks are on the second");
  t.equal(await page.locator(".card .said b:empty").count(), 0);
  // The narrowest of each arrangement, and the phones.
  for (const narrow of [1240, 1041, 721, 561, 390, 361, 320]) {
    await page.setViewportSize({ width: narrow, height: 844 });
    t.equal(await width(), narrow);
    t.same(await cutOff(page), [], `no text is cut off at ${narrow} px`);
    const lines = await page
      .locator("#weights b, #legend b, #log td:not(:first-child)")
      .evaluateAll((all) => all.map((one) => one.getClientRects().length && (one as HTMLElement).offsetHeight));
    t.ok(lines.length > 10 && lines.every((height) => height < 26), `figures take one line: ${lines}`);
  }
  await cardOf(page, "sections-3").tap();
  await page.locator("#log tr:first-child", { hasText: "sections-3" }).waitFor();
  await settled(page);
  t.equal(await width(), 320);
  const paper = (): Promise<string> => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
  const dark = await paper();
  await page.locator("#theme").tap();
  t.not(await paper(), dark, "the toggle wins over the system's wish");
  t.same(complaints, []);
});

// Software takes a minute for it. The other page runs on WebGPU in page-llm.test.ts.
if (soak)
  t.test("failures say what to do", { skip }, async (t) => {
    const failureOf = async (prepare: (page: Page) => Promise<unknown>): Promise<string> => {
      const { page } = await newPage();
      await prepare(page);
      await page.goto(server.url);
      await page.locator("#failure").waitFor();
      const text = (await page.locator("#failure").textContent())!;
      await page.close();
      return text;
    };
    const html = { contentType: "text/html", body: "<!doctype html><title>Not found</title>" };
    t.match(
      await failureOf((page) => page.route("**/tasks.eigen", (route) => route.fulfill(html))),
      /The pack cannot be read.*answered an HTML page/,
    );
    t.match(
      await failureOf((page) => page.route("**/model_fp16.onnx", (route) => route.fulfill({ status: 404 }))),
      /answered 404/,
    );
    t.match(await failureOf((page) => page.addInitScript("delete globalThis.WebAssembly")), /has no WebAssembly/);

    // The server fails once the page runs.
    const { page } = await newPage();
    let reads = 0;
    await page.route("**/tasks.eigen", (route) => (++reads > 3 ? route.abort() : route.continue()));
    await page.goto(server.url);
    await page.locator("#failure", { hasText: "The pack cannot be read" }).waitFor();
    await settled(page);
    t.equal(await topOf(page), "monitoring", "the first task answers");
    await cardOf(page, "debtags-game").click();
    await settled(page);
    t.ok(await page.locator("#failure").isVisible());
    t.equal(await page.locator("#cards :checked").inputValue(), "debtags-admin", "the task before stays");
    await page.unroute("**/tasks.eigen");
    await cardOf(page, "debtags-game").click();
    await page.locator("#log tr:first-child", { hasText: "18 tasks ahead" }).waitFor();
    await settled(page);
    t.same(await labelsOf(page), (await data("tasks/debtags-game.json")).labels, "and the next try works");
    t.equal(await page.locator(".card .said b:empty").count(), 0, "for all the others too");
    t.notOk(await page.locator("#failure").isVisible());
    await page.close();
  });

t.test("the server", async (t) => {
  const get = (range?: string, more: Record<string, string> = {}) =>
    fetch(`${server.url}page.css`, { headers: { ...(range && { range }), ...more } });
  const whole = await get();
  const bytes = new Uint8Array(await whole.arrayBuffer());
  t.same([whole.status, whole.headers.get("content-type")], [200, "text/css; charset=utf-8"]);
  const ranges = [
    ["bytes=10-19", 10, 20],
    [`bytes=${bytes.length - 5}-`, bytes.length - 5, bytes.length],
    ["bytes=-7", bytes.length - 7, bytes.length],
    [`bytes=0-${bytes.length + 100}`, 0, bytes.length],
  ] as const;
  for (const [range, start, end] of ranges) {
    const part = await get(range);
    t.same([part.status, part.headers.get("content-range")], [206, `bytes ${start}-${end - 1}/${bytes.length}`]);
    t.same(new Uint8Array(await part.arrayBuffer()), bytes.slice(start, end));
  }
  const beyond = await get(`bytes=${bytes.length}-`);
  t.same([beyond.status, beyond.headers.get("content-range")], [416, `bytes */${bytes.length}`]);
  t.equal((await get(undefined, { "if-none-match": whole.headers.get("etag")! })).status, 304);
  t.equal((await get("bytes=0-1", { "if-range": '"another"' })).status, 200);
  t.equal((await fetch(`${server.url}..%2f..%2f..%2fetc%2fpasswd`)).status, 404, "nothing above the folder");
  t.equal((await fetch(`${server.url}nothing`)).status, 404);
  t.equal((await fetch(server.url, { method: "POST" })).status, 405);
});
