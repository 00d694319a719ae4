#!/usr/bin/env node
/**
 * The command line: `eigenlora COMMAND …`. Exits 0, 1 (failed) or 2 (usage).
 */
import { spawnSync } from "node:child_process";
import { existsSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { nearest } from "../arguments.ts";
import { EigenLoraError } from "../errors.ts";
import { VERSION } from "../version.ts";
import { addCommand } from "./add.ts";
import { type Arguments, type OptionTable, parse, UsageError } from "./args.ts";
import { attachCommand } from "./attach.ts";
import { distillCommand } from "./distill.ts";
import { learnCommand } from "./learn.ts";
import { createOutput, type Output } from "./output.ts";
import { inspectCommand, packCommand, type Result, removeCommand, verifyCommand } from "./packs.ts";
import { assembleCommand, mergeCommand, projectCommand, shardCommand } from "./shard.ts";
import { exportCommand, foldCommand } from "./weights.ts";

interface Command {
  usage: string;
  does: string;
  options: OptionTable;
  positionals: [min: number, max: number];
  run(args: Arguments, out: Output): Promise<Result>;
}

const output = (value: string, help: string): OptionTable => ({ output: { value, short: "o", help } });
const as: OptionTable = { as: { value: "OLD=NEW", multiple: true, help: "call the task of a folder OLD NEW" } };
const gauge: OptionTable = { gauge: { value: "as-trained|balanced", help: "rewrite each pair as U√S, √SVᵀ first" } };
const trim: OptionTable = {
  rank: { value: "N", help: "keep the N strongest directions of each adapter and module (balanced)" },
};
const normalize: OptionTable = {
  normalize: { help: "every task counts alike when components are sought, however large its update is" },
};
const centering: OptionTable = { centering: { value: "keep|none", help: "store the mean of the rows, or do without" } };
const amount: OptionTable = {
  k: { value: "N", help: "so many components per module and side" },
  energy: { value: "P", help: "components that keep this share of the squared singular values (0.9)" },
};
const base: OptionTable = { base: { value: "MODEL.safetensors", help: "store fingerprints of this base model" } };
/** Known so that what is wrong with them can be said. */
const columnOnly: OptionTable = { mode: { value: "column", help: "the only mode that is made of parts" } };
const task: OptionTable = { task: { value: "ID", help: "which task" } };

const COMMANDS = new Map<string, Command>([
  [
    "pack",
    {
      usage: "pack ADAPTER_OR_FOLDER... -o FILE",
      does: "adapters → pack, with a report",
      options: {
        ...output("FILE", "the pack to write"),
        mode: {
          value: "column|flat|joint|auto",
          help: "coefficients for every row of a factor, or one vector for a whole factor; joint: bases that lose least of ΔW; auto: what is best for --bytes, --ratio, --error or --divergence",
        },
        ...gauge,
        ...trim,
        "private-terms": {
          value: "N",
          help: "N rank-1 terms of each task's own beside the components; with --error N at most (balanced)",
        },
        calibrate: { help: "weigh errors by what enters the modules on --text, with --model; auto: try that too" },
        ...normalize,
        ...centering,
        ...amount,
        error: { value: "E", help: "fewest bytes for which no task's ΔW error exceeds E" },
        bytes: { value: "SIZE", help: "as many components as fit into a file of this size: 300kB" },
        ratio: { value: "R", help: "the same, R times smaller than the adapters" },
        divergence: {
          value: "D",
          help: "auto: fewest bytes for which the mean KL between the answers of adapters and tasks is at most D nats",
        },
        model: {
          value: "MODEL.onnx",
          help: "judge by answers to --text instead of by ΔW error (auto), or calibrate by it; needs onnxruntime-node",
        },
        text: { value: "LINES.txt", help: "plain text of the tasks' kind, one on each line; never what you test on" },
        tokens: { value: "N", help: "tokens of a text at most (128)" },
        tokenizer: {
          value: "FILE",
          help: "tokenizer.json; beside the model unless given; needs @huggingface/tokenizers",
        },
        dtype: { value: "TYPE", help: "f32, f16 (default), bf16, int8, int4, int3; or basis=…,coefficients=…,head=…" },
        ...base,
        scores: {
          value: "SCORES.json",
          help: "accuracy and accuracy_head_only of each adapter, from 0 to 1: leave out those that add little",
        },
        "min-gain": { value: "X", help: "with --scores, what an adapter must add to the accuracy of its head (0.02)" },
        ...as,
      },
      positionals: [1, Infinity],
      run: packCommand,
    },
  ],
  [
    "shard",
    {
      usage: "shard ADAPTER_OR_FOLDER... -o PART",
      does: "statistics of some of very many adapters, to be merged with those of others (docs/hub.md)",
      options: {
        ...output("PART", "the part to write; left alone when it is there and made of the same"),
        ...gauge,
        ...trim,
        ...normalize,
        ...columnOnly,
        ...as,
      },
      positionals: [1, Infinity],
      run: shardCommand,
    },
  ],
  [
    "merge",
    {
      usage: "merge PART... -o BASIS",
      does: "statistics of all adapters → components: a pack without tasks",
      options: {
        ...output("BASIS", "the basis to write, or with --part the part"),
        part: { help: "write a part again, to be merged with others" },
        ...centering,
        ...amount,
        error: { value: "E", help: "not from parts: it is judged on all adapters at once" },
        dtype: { value: "TYPE", help: "of components: f32, f16 (default), bf16, int8, int4, int3" },
        ...base,
        ...columnOnly,
        "any-base": { help: "take parts whose adapters name different base models" },
      },
      positionals: [1, Infinity],
      run: mergeCommand,
    },
  ],
  [
    "project",
    {
      usage: "project BASIS ADAPTER_OR_FOLDER... -o PART",
      does: "adapters → tasks on a basis that others hold too",
      options: {
        ...output("PART", "the part to write; left alone when it is there and made of the same"),
        dtype: { value: "TYPE", help: "of coefficients and heads; or coefficients=…,head=…" },
        ...as,
      },
      positionals: [2, Infinity],
      run: projectCommand,
    },
  ],
  [
    "assemble",
    {
      usage: "assemble BASIS PART... -o PACK",
      does: "tasks of all parts → pack, sorted by id",
      options: output("PACK", "the pack to write"),
      positionals: [2, Infinity],
      run: assembleCommand,
    },
  ],
  [
    "inspect",
    {
      usage: "inspect FILE",
      does: "sections, tasks, components, explained variance, bytes, break-even",
      options: {},
      positionals: [1, 1],
      run: inspectCommand,
    },
  ],
  [
    "verify",
    {
      usage: "verify FILE [--against ADAPTER_OR_FOLDER]...",
      does: "checksums and limits; with adapters: ΔW error per task",
      options: { against: { value: "PATH", multiple: true, help: "adapters the tasks were made of" }, ...as },
      positionals: [1, 1],
      run: verifyCommand,
    },
  ],
  [
    "add",
    {
      usage: "add FILE ADAPTER_OR_FOLDER_OR_TASKFILE...",
      does: "project adapters onto the existing basis, or take learned tasks as they are, and append; other tasks' bytes stay",
      options: as,
      positionals: [2, Infinity],
      run: addCommand,
    },
  ],
  [
    "distill",
    {
      usage: "distill PACK ADAPTER_OR_FOLDER... --model MODEL.onnx --text LINES.txt -o OUT.eigen",
      does: "train coefficients until plain text is answered as by the adapters; new ones are added first; other tasks' bytes stay",
      options: {
        model: { value: "MODEL.onnx", help: "the model that tasks and adapters belong to; needs onnxruntime-node" },
        text: {
          value: "LINES.txt",
          help: "plain text of the tasks' kind, one on each line; some hundreds, never what you test on",
        },
        ...output("OUT.eigen", "the pack to write; finished tasks wait in OUT.eigen.partial"),
        steps: { value: "N", help: "steps for each task (240)" },
        batch: { value: "N", help: "texts of a step (8)" },
        tokens: { value: "N", help: "tokens of a text at most (128)" },
        tokenizer: {
          value: "FILE",
          help: "tokenizer.json; beside the model unless given; needs @huggingface/tokenizers",
        },
        ...as,
      },
      positionals: [2, Infinity],
      run: distillCommand,
    },
  ],
  [
    "learn",
    {
      usage: "learn PACK EXAMPLES.jsonl|tsv|csv --model MODEL.onnx -o TASK.eigentask",
      does: "a new task from labelled texts, trained on the pack's components; eigenlora add PACK TASK.eigentask brings it in",
      options: {
        model: { value: "MODEL.onnx", help: "the model that the pack's tasks belong to; needs onnxruntime-node" },
        ...output("TASK.eigentask", "the task file to write; after Ctrl-C with what was learned so far"),
        id: { value: "ID", help: "name of the task; that of the file unless given" },
        labels: {
          value: "a,b,c",
          help: "the labels that there may be; those of EXAMPLES, as they appear, unless given",
        },
        epochs: { value: "N", help: "passes over the examples (8)" },
        batch: { value: "N", help: "examples of a step (16)" },
        holdout: { value: "P", help: "share held back to judge each epoch by; the best is kept (0.2)" },
        rate: { value: "X", help: "learning rate (0.02)" },
        seed: { value: "N", help: "the same seed gives the same task (0)" },
        train: { value: "coefficients|lora", help: "over the pack's components, or whole factors as without a pack" },
        rank: {
          value: "N",
          help: "rows of coefficients, or rank of the factors; that of most of the pack's tasks unless given",
        },
        "private-terms": { value: "N", help: "free rank-1 terms of each module beside the coefficients (0)" },
        init: {
          value: "auto|mean|random|fresh|ID",
          help: "where coefficients begin (auto), and factors (fresh, as in PEFT); ID: as this task of the pack",
        },
        tokens: { value: "N", help: "tokens of a text at most (128)" },
        tokenizer: {
          value: "FILE",
          help: "tokenizer.json; beside the model unless given; needs @huggingface/tokenizers",
        },
      },
      positionals: [2, 2],
      run: learnCommand,
    },
  ],
  [
    "remove",
    {
      usage: "remove FILE TASK...",
      does: "drop tasks; the others' bytes stay",
      options: {},
      positionals: [2, Infinity],
      run: removeCommand,
    },
  ],
  [
    "export",
    {
      usage: "export FILE --task ID -o DIR",
      does: "back to an adapter that PEFT loads",
      options: {
        ...task,
        format: { value: "peft", help: "layout of the files" },
        ...output("DIR", "the folder to write"),
      },
      positionals: [1, 1],
      run: exportCommand,
    },
  ],
  [
    "fold",
    {
      usage: "fold FILE --task ID --base MODEL.safetensors -o OUT.safetensors",
      does: "merged weights",
      options: {
        ...task,
        base: { value: "MODEL.safetensors", help: "the base model" },
        ...output("OUT.safetensors", "the file to write"),
      },
      positionals: [1, 1],
      run: foldCommand,
    },
  ],
  [
    "attach",
    {
      usage: "attach MODEL.onnx PACK -o OUT.onnx",
      does: "an ONNX model with the components inside, and small input files per task beside it",
      options: {
        ...output("OUT.onnx", "the model to write; OUT.base.safetensors and OUT.tasks/ID.safetensors come beside it"),
        mode: { value: "auto|core|factors", help: "inputs are cores between the components, or expanded factors" },
        task: { value: "ID", multiple: true, help: "write the inputs of this task only; may be given again" },
        names: { value: "MODULE=WEIGHT", multiple: true, help: "the model's name for a module, where it is not found" },
        ignore: { value: "NAME", multiple: true, help: "leave out a parameter or module of the tasks (classifier)" },
        "any-base": { help: "accept a model whose weights differ from the pack's fingerprints" },
      },
      positionals: [2, 2],
      run: attachCommand,
    },
  ],
]);

const BENCHMARKS = [
  "memory",
  "switch",
  "fold",
  "pack",
  "size",
  "extract",
  "shapes",
  "hub",
  "learn",
  "distill",
  "calibrate",
  "step",
  "few-shot",
  "paper",
];

function help(): string {
  const lines = [...COMMANDS.values()].map(({ usage, does, options }) => {
    const details = Object.entries(options).map(
      ([name, o]) => `      --${name}${o.value ? ` ${o.value}` : ""}${o.short ? `, -${o.short}` : ""}: ${o.help}`,
    );
    return [`  eigenlora ${usage}`, `      ${does}`, ...details].join("\n");
  });
  return [
    `eigenlora ${VERSION}: many LoRA adapters on one base model`,
    "",
    ...lines,
    `  eigenlora bench ${BENCHMARKS.join("|")}`,
    "      the benchmarks, in a checkout of the repository",
    "",
    "Every command takes --json (one object on stdout) and --help. Exit codes: 0, 1 failed, 2 usage.",
  ].join("\n");
}

/** Benchmarks need the repository's data and peers, so they are not in the package; this starts them from a checkout. */
function bench(args: readonly string[]): number {
  const [name = "", ...rest] = args;
  if (!BENCHMARKS.includes(name)) throw new UsageError(`bench ${name}: expected ${BENCHMARKS.join(", ")}`);
  const paths = [`${name}.js`, `${name}/run.js`].map((path) =>
    fileURLToPath(new URL(`../../../benchmarks/${path}`, import.meta.url)),
  );
  const script = paths.find((path) => existsSync(path));
  if (!script) {
    throw new UsageError("the benchmarks come with the repository, not with the package: clone it and run this there");
  }
  return spawnSync(process.execPath, ["--expose-gc", script, ...rest], { stdio: "inherit" }).status ?? 1;
}

async function main(argv: readonly string[]): Promise<number> {
  const json = argv.includes("--json");
  try {
    const [name, ...rest] = argv;
    if (name === "--version") {
      process.stdout.write(`${VERSION}\n`);
      return 0;
    }
    if (name === undefined || name === "--help" || name === "help" || rest.includes("--help")) {
      process.stdout.write(`${help()}\n`);
      return name === undefined ? 2 : 0;
    }
    if (name === "bench") return bench(rest);
    const command = COMMANDS.get(name);
    if (!command) {
      const close = nearest(name, COMMANDS.keys());
      throw new UsageError(`unknown command "${name}"${close.length ? `; did you mean ${close[0]}?` : ""}`);
    }
    const table = { ...command.options, json: { help: "print one JSON object" } };
    const result = await command.run(parse(rest, table, ...command.positionals), createOutput(json));
    process.stdout.write(json ? `${JSON.stringify(result.json)}\n` : `${result.text}\n`);
    return result.exitCode ?? 0;
  } catch (error) {
    return fail(error, json);
  }
}

function fail(error: unknown, json: boolean): number {
  const usage = error instanceof UsageError;
  const known = usage || error instanceof EigenLoraError || error instanceof RangeError || error instanceof TypeError;
  const { message } = error as Error;
  if (json) {
    const fields = error instanceof EigenLoraError ? { ...error } : {};
    const tag = usage ? "usage" : error instanceof EigenLoraError ? error.tag : "failed";
    process.stdout.write(`${JSON.stringify({ error: { ...fields, tag, message } })}\n`);
  } else {
    process.stderr.write(`eigenlora: ${known ? message : ((error as Error).stack ?? message)}\n`);
    if (usage) process.stderr.write("See eigenlora --help.\n");
  }
  return usage ? 2 : 1;
}

process.exitCode = await main(process.argv.slice(2));
