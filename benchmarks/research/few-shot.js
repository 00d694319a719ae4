/**
 * What does a visitor of the page get who teaches two labels with 8 examples each? Through the page itself in Chromium, on WASM:
 * how good and how long, beside the head alone; and how long the window is ever kept waiting, beside the same window idle.
 *
 * The pack is the page's: all 20 tasks of own-seed. The labels are archive sections that none of them has, and all lines, those
 * taught and those judged, occur in no training set of theirs. What leaks: the lines are of the same kind, Debian's package
 * descriptions, and other sections are among the 20 tasks; the tasks' test lines may be among them, which nobody was trained on.
 *
 * Needs Chromium (EIGENLORA_CHROMIUM).
 */
import { readdir } from "node:fs/promises";
import { chromium } from "playwright-core";
import { max, mean, median } from "simple-statistics";
import { data, readTask } from "../../examples/minilm.js";
import { buildPage } from "../../examples/page/build.js";
import { serveFolder } from "../../examples/page/serve.js";
import { number, readArguments } from "../lib/arguments.js";
import { inScratch } from "../lib/process.js";
import { print, progress } from "../lib/report.js";

/**
 * @typedef {{ text: string, label: string }} Example
 * @typedef {{ labels: string[], taught: Example[], judged: Example[] }} Draw
 * @typedef {{ accuracy: number, milliseconds: number, loss: number }} Lesson
 * @typedef {{ frame: number, timer: number, frames: number[] }} Stalls milliseconds, longest
 */

const SHOTS = 8;
const JUDGED = 50;
const PAIRS = [
  ["comm", "electronics"],
  ["lisp", "vcs"],
  ["gnome", "comm"],
  ["electronics", "lisp"],
  ["vcs", "gnome"],
];
/** Settings beside the page's own, which take 20 steps: a head alone is not done by then. The rates are the page's. */
const HEAD = { batch: 16, steps: 30, learningRates: { terms: 0, head: 0.02 } };
const OTHERS = /** @type {const} */ ([
  ["head only, on the tasks' mean", { trainer: { init: "mean" }, fit: HEAD }],
  ["head only, on the plain model", { trainer: { modules: [] }, fit: HEAD }],
]);

const { json, draws, ...rest } = readArguments("What does a visitor of the page get who teaches two labels?", {
  draws: number("draws of each pair of labels", 1, 1),
  pairs: number("so many pairs of labels", PAIRS.length, 1),
});
const pairs = PAIRS.slice(0, rest.pairs);

const lines = await freshLines();
const browser = await chromium.launch({
  executablePath: process.env.EIGENLORA_CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox"],
});
const page = await browser.newPage({ serviceWorkers: "block" });
/** @type {Map<string, Lesson[]>} */
const lessons = new Map();
/** @type {Stalls[]} */
const stalls = [];
const idle = await inScratch(async (folder) => {
  await buildPage(folder);
  const server = await serveFolder(folder);
  page.setDefaultTimeout(300_000);
  await page.addInitScript(watch);
  await page.goto(server.url);
  await settled();
  const idle = await stallsDuring(() => page.waitForTimeout(20_000));
  for (const [p, pair] of pairs.entries()) {
    for (let draw = 0; draw < draws; draw++) {
      const of = drawOf(pair, 10 * p + draw);
      await record("coefficients and head, as the page teaches", () => teachByHand(of), of);
      for (const [name, how] of OTHERS) await record(name, () => ask("teach", "taught", of.labels, of.taught, how), of);
    }
  }
  await server.close();
  return idle;
});
const version = browser.version();
await browser.close();

/** @type {import("../lib/report.js").Row[]} */
const rows = [...lessons].map(([name, of]) => ({
  name,
  accuracy: mean(of.map(({ accuracy }) => accuracy)),
  each: of.map(({ accuracy }) => Math.round(100 * accuracy)).join(" "),
  seconds: median(of.map(({ milliseconds }) => milliseconds)) / 1e3,
  loss: mean(of.map(({ loss }) => loss)),
}));
/** @param {string} name @param {readonly Stalls[]} of */
const stallRow = (name, of) => ({
  name,
  "longest gap of frames, ms": max(of.map(({ frame }) => frame)),
  "median gap, ms": median(of.flatMap(({ frames }) => frames)),
  "gaps over 50 ms, %": 100 * mean(of.flatMap(({ frames }) => frames.map((gap) => Number(gap > 50)))),
  "longest lateness of a timer, ms": max(of.map(({ timer }) => timer)),
});
rows.push(stallRow("window while it teaches", stalls), stallRow("the same window, idle", [idle]));

const question = `What does a visitor get who teaches two labels with ${SHOTS} examples each? The page in Chromium ${version}, WASM.`;
const notes = [
  `${pairs.length} pairs of labels (${pairs.map((pair) => pair.join("/")).join(", ")}), ${draws} draws of each; accuracy on ${2 * JUDGED} other lines, mean, and per cent of`,
  "each draw. seconds: from the press of the button until the task is there, median. loss: of the last step.",
];
print(json, [{ question, rows, notes }]);

/** Lines of each of the labels that no adapter of the pack was trained on. */
async function freshLines() {
  const files = (await readdir(data("tasks"))).map((file) => file.replace(/\.json$/, ""));
  const known = new Set();
  /** @type {Map<string, Set<string>>} */
  const of = new Map();
  for (const id of files) {
    const { labels, train, test } = await readTask(id);
    if (!id.startsWith("hub-")) for (const [text] of train) known.add(text);
    if (!id.endsWith("-section")) continue;
    for (const [text, label] of [...train, ...test])
      of.set(labels[label], (of.get(labels[label]) ?? new Set()).add(text));
  }
  return new Map([...of].map(([label, texts]) => [label, [...texts].filter((text) => !known.has(text)).sort()]));
}

/**
 * @param {readonly string[]} labels
 * @param {number} seed
 * @returns {Draw}
 */
function drawOf(labels, seed) {
  const parts = labels.map((label) => {
    const texts = [.../** @type {string[]} */ (lines.get(label))];
    let state = seed + 1;
    for (let i = texts.length - 1; i > 0; i--) {
      // Lehmer's generator is random enough for a shuffle.
      state = (state * 48271) % 2147483647;
      const j = state % (i + 1);
      [texts[i], texts[j]] = [texts[j], texts[i]];
    }
    if (texts.length < SHOTS + JUDGED) throw new Error(`${label}: ${texts.length} lines, ${SHOTS + JUDGED} are needed`);
    return texts.slice(0, SHOTS + JUDGED).map((text) => ({ text, label }));
  });
  return {
    labels: [...labels],
    taught: parts.flatMap((part) => part.slice(0, SHOTS)),
    judged: parts.flatMap((part) => part.slice(SHOTS)),
  };
}

/** Runs in the page before its scripts: listens to the worker, and installs clocks. */
function watch() {
  const scope = /** @type {any} */ (globalThis);
  scope.Worker = class extends Worker {
    /** @param {[string, WorkerOptions]} given */
    constructor(...given) {
      super(...given);
      scope.pageWorker = this;
      this.addEventListener("message", ({ data: { value } }) => value?.steps && (scope.taught = value));
    }
  };
  scope.begin = () => {
    const found = { frame: 0, timer: 0, frames: /** @type {number[]} */ ([]) };
    let [on, frameAt, timerAt] = [true, performance.now(), performance.now()];
    const frame = () => {
      const now = performance.now();
      found.frames.push(now - frameAt);
      found.frame = Math.max(found.frame, now - frameAt);
      frameAt = now;
      if (on) requestAnimationFrame(frame);
    };
    requestAnimationFrame(frame);
    const timer = setInterval(() => {
      const now = performance.now();
      found.timer = Math.max(found.timer, now - timerAt - 50);
      timerAt = now;
    }, 50);
    scope.end = () => (clearInterval(timer), (on = false), found);
  };
}

/** @param {() => Promise<unknown>} work @returns {Promise<Stalls>} */
async function stallsDuring(work) {
  await page.evaluate("begin()");
  await work();
  return page.evaluate("end()");
}

/**
 * Calls the page's worker directly.
 * @param {string} call
 * @param {unknown[]} args
 * @returns {Promise<any>}
 */
function ask(call, ...args) {
  return page.evaluate(
    ([call, args]) => {
      const worker = /** @type {Worker} */ (/** @type {any} */ (globalThis).pageWorker);
      const id = `bench-${performance.now()}`;
      return new Promise((resolve, reject) => {
        worker.addEventListener("message", function heard({ data }) {
          if (data.id !== id) return;
          worker.removeEventListener("message", heard);
          if (data.error) reject(new Error(data.error.message));
          else resolve(data.value);
        });
        worker.postMessage({ id, call, args });
      });
    },
    /** @type {const} */ ([call, args]),
  );
}

function settled() {
  return page.locator('main[aria-busy="false"]').waitFor();
}

/**
 * Fills in the form and presses the button.
 * @param {Draw} draw
 */
async function teachByHand({ labels, taught }) {
  await page.locator("#task-name").fill("taught");
  for (const [i, label] of labels.entries()) {
    const lesson = page.locator(".lesson").nth(i);
    await lesson.locator("input").fill(label);
    await lesson.locator("textarea").fill(
      taught
        .filter((one) => one.label === label)
        .map(({ text }) => text)
        .join("\n"),
    );
  }
  const learned = page.locator("#teach-note", { hasText: /^Learned/ });
  const press = async () => {
    await page.locator("#teach-button").click();
    await learned.waitFor({ state: "detached" });
    await learned.waitFor();
    await settled();
  };
  stalls.push(await stallsDuring(press));
  return /** @type {Promise<Lesson>} */ (page.evaluate("taught"));
}

/**
 * @param {string} name
 * @param {() => Promise<Omit<Lesson, "accuracy">>} teach
 * @param {Draw} draw
 */
async function record(name, teach, { labels, judged }) {
  const { loss, milliseconds } = await teach();
  let right = 0;
  for (const { text, label } of judged) {
    /** @type {number[]} */
    const probabilities = (await ask("classify", text)).probabilities;
    if (labels[probabilities.indexOf(Math.max(...probabilities))] === label) right++;
  }
  lessons.set(name, [...(lessons.get(name) ?? []), { accuracy: right / judged.length, milliseconds, loss }]);
  progress(
    `${labels.join("/")}, ${name}: ${right}/${judged.length}, ${(milliseconds / 1e3).toFixed(1)} s, loss ${loss.toFixed(3)}`,
  );
}
