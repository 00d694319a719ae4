/** Errors of public functions for wrong arguments. */
import * as eigenlora from "eigenlora";
import {
  buildPack,
  createSigner,
  peftFiles,
  planAppend,
  planSignature,
  projectAdapters,
  readPeft,
  searchPack,
  taskAdapter,
} from "eigenlora/build";
import { findAdapters, folderStore, readAdapters } from "eigenlora/node";
import { openOnnxHost } from "eigenlora/onnx";
import { createEigenSession } from "eigenlora/onnxruntime";
import { build } from "esbuild";
import t from "tap";
import { nearest } from "../support/internals/base.ts";
import { data, vector } from "../support/packs.ts";

const { createRuntime, openPack } = eigenlora;

/** Casts a value that the compiler would refuse. */
const wrong = (value: unknown): never => value as never;
const pack = () => openPack(vector("every-kind.eigen"));

t.test("nearest names", async (t) => {
  t.same(nearest("sst", ["cola", "sst2", "mnli"]), ["sst2"]);
  t.same(nearest("haed", ["head", "tail"]), ["head"], "two letters swapped are one mistake");
  t.same(nearest("query", ["layer.0.query", "layer.0.value"]), ["layer.0.query"], "a part of a name");
  for (const [name, other] of [
    ["n", "y"],
    ["good", "bad"],
    ["a", "sarcasm"],
    ["maybe", "yes"],
    ["spam", "fine"],
    ["neutral", "negative"],
  ])
    t.same(nearest(name!, [other!]), [], `${name} is not like ${other}`);
});

t.test("the public functions", async (t) => {
  const open = await pack();
  const runtime = await createRuntime(open, { backend: "js" });
  const forgotten = "a promise; did you forget await?";
  const [first] = open.tasks.keys();
  for (const [call, message] of [
    [
      () => openPack(wrong(pack())),
      `openPack: expected a path, URL, Blob, ArrayBuffer or ByteSource, got ${forgotten}`,
    ],
    [
      () => openPack(wrong(undefined)),
      "openPack: expected a path, URL, Blob, ArrayBuffer or ByteSource, got undefined",
    ],
    [() => openPack("x", wrong({ signals: 1 })), 'openPack: unknown option "signals"; did you mean "signal"?'],
    [() => createRuntime(wrong(pack())), `createRuntime: expected an open pack (await openPack(…)), got ${forgotten}`],
    [() => createRuntime(wrong("a.eigen")), 'createRuntime: expected an open pack (await openPack(…)), got "a.eigen"'],
    [
      () => createRuntime(open, wrong({ moode: "core" })),
      'createRuntime: unknown option "moode"; did you mean "mode"?',
    ],
    ...(
      [
        ["float32", '; did you mean "f32"?'],
        ["F16", '; did you mean "f16"?'],
        ["int8", ""],
      ] as const
    ).map(
      ([dtype, advice]) =>
        [
          () =>
            createRuntime(open, { base: new Map([["w", wrong({ dtype, shape: [1], data: new Float32Array(1) })]]) }),
          `base tensor "w": unknown dtype "${dtype}", expected f32, f16 or bf16${advice}`,
        ] as const,
    ),
    [() => createRuntime(open, wrong("core")), 'createRuntime: expected an object of options, got "core"'],
    [
      () => runtime.switchTask(wrong(undefined)),
      "task: expected an id, null for the base, or strengths by id, got undefined",
    ],
    [
      () => runtime.switchTask(wrong([first])),
      "task: expected an id, null for the base, or strengths by id, got an object (Array)",
    ],
    [() => runtime.switchTask(first!, wrong({ haed: "x" })), 'switchTask: unknown option "haed"; did you mean "head"?'],
    [
      () => runtime.apply("x", wrong(0), wrong(0), wrong({ task: "x" })),
      'apply: unknown option "task"; did you mean "tasks"?',
    ],
    [() => open.load(wrong(undefined)), "task: expected an id, got undefined"],
    [
      () => open.addTask("new", wrong(pack())),
      `addTask: expected a path, URL, Blob, ArrayBuffer or ByteSource, got ${forgotten}`,
    ],
  ] as const)
    await t.rejects(async () => void (await call()), new TypeError(message), message);
  for (const [option, message] of [
    [{ mode: "x" }, 'mode: expected "core", "factors" or "folded", got "x"'],
    [{ policy: "x" }, 'policy: expected "copy" or "reload", got "x"'],
    [{ backend: "gpu" }, 'backend: expected "wasm", "js" or webgpu() of "eigenlora/webgpu", got "gpu"'],
  ] as const)
    await t.rejects(createRuntime(open, wrong(option)), new RangeError(message));
  await t.rejects(openPack("x", wrong({ bases: "x" })), new RangeError('bases: expected "now" or "later", got "x"'));
  await runtime.close();
  await open.close();
});

t.test("the public functions of building and training", async (t) => {
  const open = await pack();
  const adapters = await readAdapters([data("adapters/own-seed/debtags-role")]);
  const forgotten = "a promise; did you forget await?";
  const list = `expected a list of adapters (await readAdapters(…)), got ${forgotten}`;
  const opened = `expected an open pack (await openPack(…)), got ${forgotten}`;
  const later = wrong(Promise.resolve(adapters));
  const laterPack = wrong(pack());
  const dtypes = { basis: "f16", coefficients: "f16", head: "f16" } as const;
  for (const [call, message] of [
    [() => buildPack(later), `buildPack: ${list}`],
    [
      () => buildPack(wrong(["a folder"])),
      'buildPack: expected an adapter (readAdapters of eigenlora/node, or readPeft), got "a folder"',
    ],
    [() => buildPack(adapters, wrong({ anyBas: true })), 'buildPack: unknown option "anyBas"; did you mean "anyBase"?'],
    [() => searchPack(later, { goal: { kind: "bytes", max: 1 } }), `searchPack: ${list}`],
    [
      () => searchPack(adapters, { goal: wrong("bytes") }),
      'searchPack: goal: expected a goal, such as { kind: "bytes", max: 300_000 }, got "bytes"',
    ],
    [() => projectAdapters(laterPack, adapters, dtypes), `projectAdapters: ${opened}`],
    [() => projectAdapters(open, later, dtypes), `projectAdapters: ${list}`],
    [() => taskAdapter(laterPack, "x"), `taskAdapter: ${opened}`],
    [() => planAppend(laterPack, []), `planAppend: ${opened}`],
    [() => planSignature(laterPack, wrong(0)), `planSignature: ${opened}`],
    [() => createSigner(wrong(undefined)), "createSigner: expected an Ed25519 key pair or PEM, got undefined"],
    [
      () => peftFiles(wrong(taskAdapter(open, "terms"))),
      `peftFiles: expected an adapter (readAdapters of eigenlora/node, or readPeft), got ${forgotten}`,
    ],
    [() => readPeft(wrong(undefined)), "readPeft: expected an object of options, got undefined"],
    [() => readAdapters(wrong("adapters")), 'readAdapters: expected a list of paths, got "adapters"'],
    [() => findAdapters(wrong("adapters")), 'findAdapters: expected a list of paths, got "adapters"'],
    [async () => folderStore(wrong(undefined)), "folderStore: expected the path of a folder, got undefined"],
    [() => openOnnxHost("x", wrong({ extern: 1 })), 'openOnnxHost: unknown option "extern"; did you mean "external"?'],
    [
      () => createEigenSession(wrong(Promise.resolve()), "x", open),
      `expected the module onnxruntime-web or onnxruntime-node, got ${forgotten}`,
    ],
    [() => createEigenSession(wrong(0), "x", laterPack), `createEigenSession: ${opened}`],
    // A misspelt hash must not be ignored.
    [
      () => open.addTask("new", new Uint8Array(), wrong({ integrety: "sha256-" })),
      'addTask: unknown option "integrety"; did you mean "integrity"?',
    ],
  ] as const)
    await t.rejects(async () => void (await call()), new TypeError(message), message);
  await t.rejects(
    searchPack(adapters, { goal: wrong({ kind: "size", max: 1 }) }),
    new RangeError('goal.kind: expected "bytes", "error" or "score", got "size"'),
  );
  const [first] = open.tasks.keys();
  await open.prefetch(first!);
  t.ok(open.tasks.get(first!)!.resident, "one id is one id, not its letters");
  for (const adapter of adapters) await adapter.close();
  await open.close();
});

t.test("an error's name is its class, also minified", async (t) => {
  const contents = 'export * from "eigenlora"';
  const stdin = { contents, resolveDir: new URL("../..", import.meta.url).pathname };
  const { outputFiles } = await build({ stdin, bundle: true, minify: true, format: "esm", write: false });
  const url = `data:text/javascript,${encodeURIComponent(outputFiles[0]!.text)}`;
  const minified = (await import(url)) as typeof eigenlora;
  for (const { FormatError, TaskError, BaseMismatchError, AdapterError, SourceError, BackendError } of [
    eigenlora,
    minified,
  ]) {
    for (const [error, name] of [
      [new FormatError("m", { file: "f", part: "p" }), "FormatError"],
      [new SourceError("m", { file: "f" }), "SourceError"],
      [new AdapterError("m", { file: "f" }), "AdapterError"],
      [new TaskError("m", { task: "t" }), "TaskError"],
      [new BaseMismatchError("m", { module: "m" }), "BaseMismatchError"],
      [new BackendError("m", { backend: "b" }), "BackendError"],
    ] as const) {
      t.equal(error.name, name);
      t.match(error.stack, new RegExp(`^${name}: `));
    }
  }
});
