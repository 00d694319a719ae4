/**
 * The page with a language model, as visitors get it: built from a tiny decoder, served by its own server, in a real
 * Chromium. Its answers are PEFT's.
 */
import { execFile } from "node:child_process";
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { promisify } from "node:util";
import { openPack } from "eigenlora";
import type { Page } from "playwright-core";
import t, { type Test } from "tap";
import { buildLlmPage } from "../../examples/page/llm/build.js";
import { decode } from "../../examples/page/llm/decode.js";
import { type Answered, serveFolder } from "../../examples/page/serve.js";
import { launch, settled, noChromium as skip } from "../support/browser.ts";
import { folderFor, fromRoot } from "../support/folder.ts";
import { axeFindsNothing } from "../support/page-axe.ts";
import { ask, PROMPTS, pick, tinyMaterial, visit } from "../support/page-llm.ts";
import { generations, textOf } from "../support/pipelines.ts";
import { NODE, open } from "../support/sessions.ts";

const folder = folderFor(t);
const material = await tinyMaterial();
const facts = await buildLlmPage(folder, material);
const answers: Answered[] = [];
const server = await serveFolder(folder, { onAnswer: (answered) => answers.push(answered) });
t.teardown(() => server.close());
/** Shared by all tests here: each opens a window of its own. */
const browser = skip ? undefined! : await launch(t, ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"]);
const SKILLS = ["upper", "lower"] as const;

const goldens = await generations("decoder/goldens.json");
/** PEFT's answer; the page trims the spaces around it. */
const golden = (task: string, prompt: string): string =>
  textOf(goldens.find((one) => one.task === task && one.prompt === prompt)!.ids, 1).trim();
const saidBy = (page: Page, id: string): Promise<string | null> =>
  page.locator(`.card[data-task="${id}"] .said b`).textContent();

/** onnxruntime-node's answer with a task file on the same pack: the tokens, without the page. */
async function inNode(t: Test, file: Uint8Array<ArrayBuffer>, prompt: string): Promise<string> {
  const pack = await openPack(await readFile(join(folder, "tasks.eigen")));
  const session = await open(NODE, material.model, pack);
  t.teardown(async () => (await session.close(), pack.close()));
  await session.addTask("theirs", file);
  await session.switchTask("theirs");
  const ids: number[] = [];
  // The decoder has no arrow: the tokenizer leaves it out.
  const tokens = Array.from(prompt.replace("→", ""), (letter) => (letter === " " ? 95 : letter.charCodeAt(0) - 32));
  for await (const [token] of decode(NODE, session, [tokens], facts)) ids.push(token!);
  return textOf(ids, 1).trim();
}

t.test("skills answer as PEFT does, token by token, alone and all at once", { skip }, async (t) => {
  const { page, complaints } = await visit(browser, server.url, { serviceWorkers: "block" });
  t.equal(await page.locator("#reply").textContent(), golden("upper", PROMPTS[0]), "the first answer");
  t.match(await page.locator("#cold").textContent(), /^Cold start: 3 requests/);
  const packReads = (): number => answers.filter(({ path }) => path === "/tasks.eigen").length;
  const read = packReads();
  await page.evaluate(() => {
    const seen: string[] = [];
    Object.assign(globalThis, { seen });
    const reply = document.getElementById("reply")!;
    new MutationObserver(() => seen.push(reply.textContent)).observe(reply, { childList: true });
  });
  for (const prompt of PROMPTS) {
    await ask(page, prompt);
    for (const id of SKILLS) {
      t.equal(await pick(page, id), golden(id, prompt), `${id}: ${prompt}`);
      t.equal(await saidBy(page, id), golden(id, prompt));
    }
    await page.locator("#ask-all").click();
    await settled(page);
    t.same(
      await Promise.all(SKILLS.map((id) => saidBy(page, id))),
      [...SKILLS].map((id) => golden(id, prompt)),
    );
    t.match(
      await page.locator("#tasks-note").textContent(),
      /^2 answers, 2[34] tokens in .*: a skill per row of a batch$/,
    );
  }
  const seen = await page.evaluate(() => (globalThis as unknown as { seen: string[] }).seen);
  const last = golden("lower", PROMPTS[2]);
  t.ok(
    seen.some((text) => text.length > 0 && text.length < last.length && last.startsWith(text)),
    "text streams",
  );
  const row = await page.locator("#log tr", { hasText: "lower: The" }).first().locator("td").allTextContents();
  t.ok(row.length === 4 && row.slice(1).every((cell) => / m?s$/.test(cell)), `switch, first token, all: ${row}`);
  t.match(await page.locator("#pace").textContent(), /^[\d.]+$/);
  t.equal(packReads(), read, "nothing more is read");

  t.test("what they weigh", async (t) => {
    const bars = await page.locator("#weights p").allTextContents();
    const kB = (bytes: number): string => `${(bytes / 1e3).toFixed(bytes < 1e5 ? 1 : 0)} kB`;
    t.match(bars[1], `2 adapters${kB(material.adapters)}`);
    t.match(bars[2], `one pack${kB(facts.pack)}`);
    t.match(bars[6], `2 models${kB(2 * facts.model)}`);
    t.match(await page.locator("#legend").textContent(), /model.*components.*coefficients/);
  });

  t.test("an example; no words, no answer; a new wish ends the one before", async (t) => {
    await page.locator("#example").click();
    await settled(page);
    t.equal(await page.locator("#sentence").inputValue(), PROMPTS[0]);
    t.equal(await ask(page, "  "), "");
    t.equal(await page.locator("#status").textContent(), "Write a word first.");
    await page.locator("#sentence").fill(PROMPTS[1]);
    await page.evaluate(() => {
      for (const id of ["ask-all", "ask", "ask-all", "ask"]) document.getElementById(id)!.click();
    });
    await settled(page);
    t.equal(await page.locator("#reply").textContent(), golden("lower", PROMPTS[1]));
    const [newest, older] = await page.locator("#log td:first-child").allTextContents();
    t.match(newest, `lower: ${PROMPTS[1]} →`);
    t.match(older, `${PROMPTS[0]} →`, "one of four");
  });

  t.test("axe finds nothing, and nothing is wider than the screen", async (t) => {
    await axeFindsNothing(t, page);
    await page.setViewportSize({ width: 320, height: 640 });
    t.equal(await page.evaluate(() => document.documentElement.scrollWidth), 320);
  });
  t.same(complaints, []);
});

/** Replaces lines in the form, teaches them, and waits for the verdict. */
async function teach(page: Page, name: string, lines: readonly string[], said: RegExp): Promise<void> {
  await page.locator("#skill-name").fill(name);
  await page.locator("#before").fill("");
  await page.locator("#lines").fill(lines.join("\n"));
  await page.locator("#teach-button").click();
  await page.locator("#teach-note", { hasText: said }).waitFor();
  await settled(page);
}

t.test("teaches a skill that answers beside the others, and leaves as a file", { skip }, async (t) => {
  const { page, complaints } = await visit(browser, server.url, { serviceWorkers: "block" });
  page.setDefaultTimeout(60_000);
  const lines = ["ab → ba", "cd -> dc", "", "ef => fe", "gh\thg"];
  await teach(page, "turned", lines, /^Learned in .*: turned is a skill of .*B\. Write something above to try it\.$/);
  t.equal(await page.locator("#active-name").textContent(), "turned");
  const points = (await page.locator("#loss polyline").getAttribute("points"))!.split(" ");
  const [, steps, loss] = /^Step \d+ of (\d+), loss ([\d.]+)$/.exec(
    (await page.locator("#teach-step").textContent())!,
  )!;
  t.equal(points.length, Number(steps), "each step is drawn");
  const [, first] = /: ([\d.]+) at first, now/.exec((await page.locator("#loss").getAttribute("aria-label"))!)!;
  t.ok(Number(loss) < Number(first), `loss ${first} → ${loss}`);

  const answer = await ask(page, "ab");
  const [download] = await Promise.all([page.waitForEvent("download"), page.locator("#download").click()]);
  const bytes = new Uint8Array(await readFile(await download.path()));
  t.equal(answer, await inNode(t, bytes, "ab →"), "its file answers alike in Node");
  t.not(answer, golden("upper", PROMPTS[0]));
  const pack = await openPack(await readFile(join(folder, "tasks.eigen")));
  await pack.addTask("turned", bytes);
  t.match(pack.tasks.get("turned")!.metadata.template, /^\{input\} → \{output\}/);
  await pack.close();
  await page.locator("#ask-all").click();
  await settled(page);
  t.equal(await saidBy(page, "turned"), answer, "in a batch too");

  t.test("what cannot be learned from is said at once; stopped at once, nothing is learned", async (t) => {
    for (const [name, wrong, expected] of [
      ["Upper", lines, "There is a skill called Upper already. Choose another name."],
      ["x", ["ab → ba", "no arrow"], "Line 2 is no example. Write it like this: France → Paris"],
      ["x", ["ab → ba"], "Write two examples at least; a dozen is better."],
    ] as const)
      await teach(page, name, wrong, new RegExp(`^${expected.replace("?", "\\?")}`));
    await page.locator("#lines").fill(lines.join("\n"));
    await page.evaluate(() => {
      for (let i = 0; i < 2; i++) document.getElementById("teach-button")!.click();
    });
    await page.locator("#teach-note", { hasText: "Stopped before the first step" }).waitFor();
    t.equal(await page.locator(".card").count(), 3);
  });

  t.test("taught again, it takes the place of the one before", async (t) => {
    await teach(page, "turned", ["ab → zz", "cd → zz", "ef → zz"], /^Learned in /);
    t.equal(await page.locator(".card").count(), 3);
    t.not(await ask(page, "ab"), answer);
    t.equal(await pick(page, "upper"), await saidBy(page, "upper"));
  });
  t.same(complaints, []);
});

t.test("without the model, the command says how to make it", async (t) => {
  const serve = fromRoot("examples/page/serve.js");
  const refused = async (model: string, env: NodeJS.ProcessEnv): Promise<string> => {
    const run = promisify(execFile)(process.execPath, [serve, "--model", model], { env: { ...process.env, ...env } });
    return run.then(
      () => "it ran",
      ({ code, stderr }) => `${code} ${stderr.trim()}`,
    );
  };
  const how = "make the model with `npm run smollm2 -- FOLDER`, which needs Python, and set EIGENLORA_SMOLLM2=FOLDER.";
  t.equal(await refused("llm", { EIGENLORA_SMOLLM2: "" }), `1 EIGENLORA_SMOLLM2 names no folder: ${how}`);
  const model = join(folder, "onnx/model_q4.onnx");
  t.equal(await refused("llm", { EIGENLORA_SMOLLM2: folder }), `1 ${model} is not there: ${how}`);
  t.equal(await refused("gpt", {}), '1 --model: expected "minilm" or "llm", got "gpt"');
});
