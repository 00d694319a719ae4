/**
 * The command learn: a new task from labelled texts, or prompts with completions, trained on a pack's components, as a
 * task file. `eigenlora add` brings it into the pack.
 */

import { basename, extname } from "node:path";
import type { EigenSession } from "../../bindings/onnxruntime.ts";
import type { Pack } from "../core/pack.ts";
import { BaseMismatchError, TaskError } from "../errors.ts";
import { sharedBases } from "../format/format.ts";
import { mean } from "../tensor/dtypes.ts";
import { createTrainer, type Start, type TrainingStep } from "../train/trainer.ts";
import { type Attach, command } from "./command.ts";
import { openTrainable, readExamples } from "./model.ts";
import { byDefault, force, from, group, match, number, output, POSITIVE, required, runsOn, text } from "./options.ts";
import { bytes, count, percent, resources, table } from "./output.ts";

const OPTIONS = {
  output: output(
    "TASK.eigentask",
    "The task file to write, whose name the task gets. Ctrl-C ends the training and writes the best epoch so far, or before the first has ended the last step; " +
      "the exit code is 130 either way, and a message says if nothing was written.",
  ),
  force,
  ...group("The model", {
    model: required(text("MODEL.onnx", "The model that the pack's tasks belong to. Needs onnxruntime-node.", "model")),
    ...runsOn,
    ...match,
  }),
  ...group("What is trained", {
    rank: number(
      "N",
      "Rows of coefficients, or rank of the factors. Default: that of most tasks of the pack.",
      from(1),
    ),
    init: text("START", "Where training begins: auto, mean, random, or the id of a task of the pack. Default: auto."),
  }),
  ...group("How", {
    epochs: byDefault(8, number("N", "Passes over the examples.", from(1))),
    batch: byDefault(16, number("N", "Examples per step.", from(1))),
    holdout: byDefault(
      0.2,
      number(
        "P",
        "Share of the examples held back to judge the epochs by; the one with the least loss on them is kept.",
        {
          expected: "a share from 0 to less than 1",
          holds: (n) => n >= 0 && n < 1,
        },
      ),
    ),
    rate: number("X", "Learning rate of terms and head. Default: 0.02; of whole factors, 0.002.", POSITIVE),
    seed: byDefault(0, number("N", "The same seed gives the same task.", from(0))),
  }),
};

/** The first Ctrl-C ends it between two steps, and what was learned is written; a second ends the process. */
export const learn: Attach = command({
  usage: "learn <PACK> <EXAMPLES>",
  details:
    'EXAMPLES is a file of JSON lines: {"text": "…", "label": "…"}, or for language models ' +
    '{"prompt": "…", "completion": "…"} or {"messages": […]}. Coefficients over the pack\'s components and a head are trained; without ' +
    "components, whole factors. eigenlora add PACK TASK.eigentask then adds the task to the pack.",
  example: "learn tasks.eigen lines.jsonl --model model.onnx -o mine.eigentask",
  options: OPTIONS,
  reads: ["file", undefined],
  async run([packPath, examplesPath]: [string, string], options, run, out) {
    const { output: file, model, force, tokenizer } = options;
    const id = basename(file, extname(file));
    const target = await run.target(file, { force, inputs: [packPath, examplesPath, model, tokenizer] });
    const signal = run.interrupts();
    const { examples, labels } = await readExamples(examplesPath);
    const pack = await run.pack(packPath);
    const unshared = !pack.modules.some(sharedBases);
    if (unshared && pack.directory.basis.step === undefined)
      out.warn(
        "the pack has no shared components, so the task becomes a LoRA of its own: pack with --k N, or without options, for smaller ones",
      );
    const init = startOf(options.init, pack);
    out.phase("loading the model");
    const { session, encode } = await openTrainable("learn", model, pack, options, run, labels === undefined);
    refuseOtherKind(session, labels === undefined, examplesPath);
    refuseInterrupted(signal, id);
    const { seed, rank, rate } = options;
    const trainer = await createTrainer(session, { seed, rank, labels, init, encode });
    out.phase("checking gradients, and where to begin");
    const steps: TrainingStep[] = [];
    try {
      const { epochs, batch, holdout } = options;
      const learningRates = rate === undefined ? undefined : { terms: rate, head: rate };
      for await (const step of trainer.fit(examples, { epochs, batch, holdout, learningRates, signal })) {
        steps.push(step);
        const detail = `(epoch ${step.epoch}, loss ${step.loss.toFixed(3)})`;
        out.progress({ stage: "learning", done: step.step, total: step.steps, unit: "steps", detail });
      }
    } catch (error) {
      if (error !== signal.reason) throw error;
    }
    if (steps.length === 0) refuseInterrupted(signal, id);
    const size = await target.write([await trainer.task({ id })]);
    const { terms, head } = trainer.size;
    const { seconds } = resources();
    const interrupted = signal.aborted;
    const epochs = epochsOf(steps);
    // The state of this epoch was kept; where none was judged, that of the last step.
    const judged = epochs.flatMap((epoch) => epoch.holdout ?? []);
    const best = judged.reduce((a, b) => (b.loss < a.loss ? b : a), judged[0]!) ?? null;
    const weight = unshared ? "factor weight" : "coefficient";
    const kept = best ? epochs.findIndex(({ holdout }) => holdout === best) + 1 : epochs.length;
    if (best?.accuracy === 0)
      out.warn("no example that was held back is answered right: train for more --epochs, or with another --rate");
    const kind = labels ? { labels } : {};
    const learned = { file, id, bytes: size, ...kind, examples: examples.length, trained: { terms, head } };
    const stopped = interrupted ? `, stopped at step ${steps.length} of ${steps[0]!.steps}` : "";
    return {
      json: { ...learned, interrupted, seconds, steps: steps.length, epochs, kept, holdout: best },
      text: [
        `${file}: task "${id}", ${labels ? `${count(labels.length, "label")}, ` : ""}${bytes(size)}${stopped}`,
        ...epochTable(epochs, kept, best !== null),
        ...(best ? [] : ["No epoch was judged by examples held back: the last step is kept."]),
        `trained ${count(terms, weight)}${head > 0 ? ` and ${count(head, "head weight")}` : ""}; ${seconds.toFixed(2)} s`,
      ],
    };
  },
});

/** @throws BaseMismatchError when the examples are not of the kind that the model learns from */
function refuseOtherKind({ trainable }: EigenSession, completions: boolean, file: string): void {
  const tokens = trainable?.graph.tokens !== undefined;
  if (tokens === completions) return;
  const [gives, expected] = tokens
    ? ["answers token by token", '{"prompt": "…", "completion": "…"} or {"messages": […]}']
    : ["gives one row of logits for each text", '{"text": "…", "label": "…"}'];
  const message = `the model ${gives}: expected ${expected} on each line of ${file}`;
  throw new BaseMismatchError(message, { module: trainable!.graph.logitsOutput });
}

/** @throws TaskError when it is no task of the pack either */
function startOf(text: string | undefined, { tasks, name }: Pack): Start | undefined {
  if (text === undefined || text === "auto" || text === "mean" || text === "random") return text;
  if (tasks.has(text)) return { task: text };
  throw new TaskError(`--init ${text}: expected auto, mean, random, or a task of ${name}`, { task: text });
}

/** @throws TaskError when there was a Ctrl-C */
function refuseInterrupted({ aborted }: AbortSignal, id: string): void {
  if (aborted) throw new TaskError("stopped before the first step: nothing was learned, nothing written", { task: id });
}

interface Epoch {
  readonly loss: number;
  readonly holdout: TrainingStep["holdout"] | null;
}

function epochsOf(steps: readonly TrainingStep[]): Epoch[] {
  return [...new Set(steps.map(({ epoch }) => epoch))].map((epoch) => {
    const within = steps.filter((step) => step.epoch === epoch);
    return { loss: mean(within.map(({ loss }) => loss)), holdout: within.at(-1)!.holdout ?? null };
  });
}

/** @param kept number of the epoch whose state was kept */
function epochTable(epochs: readonly Epoch[], kept: number, judged: boolean): string[] {
  const rows = epochs.map(({ loss, holdout }, i) => [
    i + 1,
    loss.toFixed(4),
    ...(judged ? (holdout ? [holdout.loss.toFixed(4), percent(holdout.accuracy)] : ["", ""]) : []),
    i + 1 === kept ? (judged ? "kept: the least hold-out loss" : "kept") : "",
  ]);
  return table([["epoch", "loss", ...(judged ? ["hold-out loss", "accuracy"] : []), ""], ...rows]);
}
