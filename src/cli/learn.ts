/**
 * The command learn: a new task from labelled texts, trained on a pack's components, as a task file. `eigenlora add` brings it
 * into the pack.
 */
import { basename, extname } from "node:path";
import { createEigenSession } from "../../bindings/onnxruntime.ts";
import { TaskError } from "../errors.ts";
import { isTaskId } from "../format/format.ts";
import { openPack, type Pack } from "../pack/pack.ts";
import { createTrainer } from "../train/learn.ts";
import type { Start } from "../train/start.ts";
import type { TrainingStep } from "../train/trainer.ts";
import { type Arguments, choice, number, refuseOverwriting, required, UsageError, wholeNumber } from "./args.ts";
import { readExamples } from "./examples.ts";
import { writeWhole } from "./files.ts";
import { loadRuntime, loadTokenizer } from "./model.ts";
import { bytes, type Output, percent, table } from "./output.ts";
import type { Result } from "./packs.ts";

/**
 * `learn PACK EXAMPLES --model MODEL.onnx -o TASK.eigentask`. The first Ctrl-C ends it between two steps, and what was learned is
 * written; a second ends the process.
 */
export async function learnCommand(args: Arguments, out: Output): Promise<Result> {
  const interrupt = new AbortController();
  const stop = (): void => interrupt.abort();
  process.once("SIGINT", stop);
  try {
    return await learn(args, out, interrupt.signal);
  } finally {
    process.off("SIGINT", stop);
  }
}

async function learn(args: Arguments, out: Output, signal: AbortSignal): Promise<Result> {
  const started = performance.now();
  const [packPath = "", examplesPath = ""] = args.positionals;
  const target = required(args, "output");
  const model = required(args, "model");
  for (const path of [packPath, examplesPath, model]) refuseOverwriting(target, path);
  const id = args.text("id") ?? basename(target, extname(target));
  if (!isTaskId(id))
    throw new UsageError(`--id ${JSON.stringify(id)}: expected 1 to 255 bytes without control characters`);
  const rate = number(args, "rate", 0.02, (n) => n > 0, "a number above 0");
  const fit = {
    epochs: wholeNumber(args, "epochs", 8),
    batch: wholeNumber(args, "batch", 16),
    holdout: number(args, "holdout", 0.2, (n) => n >= 0 && n < 1, "a share from 0 to less than 1"),
    learningRates: { terms: rate, head: rate },
  };
  const options = {
    seed: number(args, "seed", 0, (n) => Number.isInteger(n) && n >= 0, "a whole number from 0"),
    train: choice(args, "train", ["coefficients", "lora"] as const, "coefficients"),
    privateTerms: number(args, "private-terms", 0, (n) => Number.isInteger(n) && n >= 0, "a whole number from 0"),
    ...(args.text("rank") === undefined ? {} : { rank: wholeNumber(args, "rank", 8) }),
  };
  const tokens = wholeNumber(args, "tokens", 128);
  const { examples, labels } = await readExamples(examplesPath, labelsOf(args));
  const ort = await loadRuntime("learn");
  const encodeFor = await loadTokenizer("learn", ort, model, args.text("tokenizer"), tokens);
  const pack = await openPack(packPath);
  try {
    const init = startOf(args, pack);
    const session = await createEigenSession(ort, model, pack, { trainable: true });
    try {
      refuseInterrupted(signal, id);
      const trainer = await createTrainer(session, { ...options, labels, init, encode: encodeFor(session.inputNames) });
      const steps: TrainingStep[] = [];
      try {
        for await (const step of trainer.fit(examples, { ...fit, signal })) {
          steps.push(step);
          out.progress(`epoch ${step.epoch}, loss ${step.loss.toFixed(3)}: step`, step.step, step.steps);
        }
      } catch (error) {
        if (error !== signal.reason) throw error;
      }
      if (steps.length === 0) refuseInterrupted(signal, id);
      const size = await writeWhole(target, [await trainer.task({ id })]);
      const seconds = (performance.now() - started) / 1000;
      const { terms, head } = trainer.size;
      return report(
        {
          file: target,
          id,
          bytes: size,
          labels,
          examples: examples.length,
          trained: { terms, head },
          interrupted: signal.aborted,
          seconds,
        },
        steps,
      );
    } finally {
      await session.close();
    }
  } finally {
    await pack.close();
  }
}

/** --labels a,b,c. @throws UsageError for fewer than two, or two alike */
function labelsOf(args: Arguments): string[] | undefined {
  const labels = args
    .text("labels")
    ?.split(",")
    .map((label) => label.trim());
  if (labels === undefined) return undefined;
  if (labels.length >= 2 && new Set(labels).size === labels.length && !labels.includes("")) return labels;
  throw new UsageError(`--labels ${args.text("labels")}: expected two at least, all different, as a,b,c`);
}

/** --init auto|mean|random|fresh, or a task of the pack. @throws TaskError when there is none of that id */
function startOf(args: Arguments, { tasks, name }: Pack): Start | undefined {
  const text = args.text("init");
  if (text === undefined || text === "auto" || text === "mean" || text === "random" || text === "fresh") return text;
  if (tasks.has(text)) return { task: text };
  throw new TaskError(`--init ${text}: expected auto, mean, random, fresh, or a task of ${name}`, { task: text });
}

/** @throws TaskError when there was a Ctrl-C */
function refuseInterrupted({ aborted }: AbortSignal, id: string): void {
  if (aborted) throw new TaskError("stopped before the first step: nothing was learned, nothing written", { task: id });
}

interface Learned {
  file: string;
  id: string;
  bytes: number;
  labels: readonly string[];
  examples: number;
  trained: { terms: number; head: number };
  interrupted: boolean;
  seconds: number;
}

function report(learned: Learned, steps: readonly TrainingStep[]): Result {
  const epochs = [...new Set(steps.map(({ epoch }) => epoch))].map((epoch) => {
    const own = steps.filter((step) => step.epoch === epoch);
    return {
      loss: own.reduce((sum, { loss }) => sum + loss, 0) / own.length,
      holdout: own.at(-1)!.holdout ?? null,
    };
  });
  // The state of this epoch was kept; after Ctrl-C that of the last step.
  const judged = epochs.flatMap(({ holdout }) => holdout ?? []);
  const best = learned.interrupted ? undefined : judged.reduce((a, b) => (b.loss < a.loss ? b : a), judged[0]!);
  const { file, id, labels, trained, interrupted, seconds } = learned;
  const text = [
    `${file}: task "${id}", ${labels.length} labels, ${bytes(learned.bytes)}${interrupted ? `, stopped at step ${steps.length} of ${steps[0]!.steps}` : ""}`,
    table([
      ["epoch", "loss", ...(judged.length > 0 ? ["hold-out", "accuracy"] : [])],
      ...epochs.map(({ loss, holdout }, i) => [
        i + 1,
        loss.toFixed(4),
        ...(judged.length > 0 ? [holdout?.loss.toFixed(4) ?? "", holdout ? percent(holdout.accuracy) : ""] : []),
      ]),
    ]),
    `${trained.terms} numbers of terms and ${trained.head} of the head were trained; ${seconds.toFixed(2)} s`,
  ].join("\n");
  return {
    json: { ...learned, steps: steps.length, epochs, holdout: best ?? null },
    text,
    exitCode: interrupted ? 1 : 0,
  };
}
