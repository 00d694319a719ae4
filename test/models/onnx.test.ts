/**
 * ONNX models as bases: parameters found and named, values equal to the checkpoint's, damaged files refused. The models
 * and the digests of their parameters were made by PyTorch (test/data/onnx/make.py, test/data/minilm/weights.py).
 */
import { createHash } from "node:crypto";
import { readdirSync, readFileSync } from "node:fs";
import { resolve } from "node:path";
import { type ByteSource, EigenLoraError, SourceError } from "eigenlora";
import { openOnnxHost } from "eigenlora/onnx";
import fc from "fast-check";
import t from "tap";
import { openSource } from "../support/internals/base.ts";
import {
  findParameters,
  type GraphProto,
  type ModelProto,
  parseModel,
  readOnnxTensor as readTensor,
  skeletonOf,
  toBinary,
} from "../support/internals/models.ts";
import { WeightResolver } from "../support/internals/runtime.ts";
import { data } from "../support/packs.ts";
import { runs } from "../support/required.ts";

const DATA = resolve("test/data/onnx");
const MINILM = resolve("test/data/minilm");
const EXPORTS = readdirSync(DATA)
  .filter((file) => file.endsWith(".onnx"))
  .map((file) => file.slice(0, -5));

type Digests = Record<string, [shape: number[], sha256: string]>;

const digestsOf = (file: string): Digests => JSON.parse(readFileSync(file, "utf8"));
const modelOf = (name: string): Uint8Array => new Uint8Array(readFileSync(`${DATA}/${name}.onnx`));
const sha256 = (bytes: Uint8Array): string => createHash("sha256").update(bytes).digest("hex");

/** The bytes of the transposed matrix. */
function turned(bytes: Uint8Array, [rows, columns]: readonly number[]): Uint8Array {
  const size = bytes.length / (rows! * columns!);
  const out = new Uint8Array(bytes.length);
  for (let i = 0; i < rows!; i++) {
    for (let j = 0; j < columns!; j++) {
      const from = (i * columns! + j) * size;
      out.set(bytes.subarray(from, from + size), (j * rows! + i) * size);
    }
  }
  return out;
}

/** Names of `digests` that the host lacks, or has with other values, up to the layout that it states. */
async function differences(host: Awaited<ReturnType<typeof openOnnxHost>>, digests: Digests): Promise<string[]> {
  const locator = new WeightResolver(host);
  const wrong: string[] = [];
  for (const [name, [shape, sha]] of Object.entries(digests)) {
    const found = locator.names.find(name);
    if (!("name" in found)) {
      wrong.push(`${name} is missing`);
      continue;
    }
    const { layout } = locator.parameters.get(found.name)!;
    const view = await host.read(found.name);
    const bytes = view.data as Uint8Array;
    // The checkpoint's own layout is unknown here: "in-out" for Conv1D, "out-in" for Linear.
    const asStored = view.shape.join() === shape.join() && sha256(bytes) === sha;
    const asTurned = view.shape.toReversed().join() === shape.join() && sha256(turned(bytes, view.shape)) === sha;
    if (!asStored && !(layout === "in-out" && asTurned)) wrong.push(`${name} differs as ${layout} [${view.shape}]`);
  }
  return wrong;
}

t.test("the f16 export of MiniLM has every parameter of the checkpoint", async (t) => {
  const digests = digestsOf(`${MINILM}/weights.json`);
  const host = await openOnnxHost(`${MINILM}/model_fp16.onnx`);
  t.equal(Object.keys(digests).length, 103);
  t.strictSame(await differences(host, digests), []);
  const layouts = new Map([...host.list()].map(({ name, layout }) => [name, layout]));
  t.equal(layouts.get("bert.encoder.layer.3.output.dense.weight"), "in-out");
  t.equal(layouts.get("bert.pooler.dense.weight"), "out-in");
  t.equal(layouts.get("bert.embeddings.word_embeddings.weight"), "embedding");
  t.equal(layouts.get("bert.embeddings.LayerNorm.weight"), undefined);

  const locator = new WeightResolver(host);
  for (let i = 0; i < 6; i++) {
    for (const part of ["query", "value"]) {
      const name = `bert.encoder.layer.${i}.attention.self.${part}`;
      const found = locator.locate({ name, out: 384, in: 384, layout: "out-in" });
      t.match(found, { name: `${name}.weight`, transposed: true, dtype: "f16", byteLength: 384 * 384 * 2 });
      const headless = { name: name.slice("bert.".length), out: 384, in: 384, layout: "out-in" } as const;
      t.equal(locator.locate(headless).name, found.name);
    }
  }
});

t.test("every parameter of the PyTorch model is found in its export", async (t) => {
  for (const name of EXPORTS) {
    const host = await openOnnxHost(`${DATA}/${name}.onnx`);
    t.strictSame(await differences(host, digestsOf(`${DATA}/${name}.json`)), [], name);
    await host.close?.();
  }
});

t.test("layouts", async (t) => {
  const layoutsOf = (name: string): Record<string, unknown> =>
    Object.fromEntries(findParameters(parseModel(modelOf(name), name)).map(({ name, layout }) => [name, layout]));
  t.strictSame(layoutsOf("gemms"), {
    "up.weight": "out-in",
    "up.bias": undefined,
    "down.weight": "in-out",
    "down.bias": undefined,
  });
  t.match(layoutsOf("convs"), { "features.0.weight": "conv", "features.2.weight": "conv", "head.weight": "out-in" });
  t.match(layoutsOf("tied-torchscript"), { "embed.weight": "embedding", "head.weight": "in-out", mix: "in-out" });
  t.match(layoutsOf("tied-dynamo-unfolded"), { "embed.weight": "embedding", "head.weight": "out-in", mix: "in-out" });
  t.match(layoutsOf("by-hand"), { "cast.weight": "in-out", "turned.weight": "out-in", "branch.weight": "in-out" });
});

t.test("merged parameters have all their names", (t) => {
  const parameters = findParameters(parseModel(modelOf("bert-torchscript"), "model"));
  const query = parameters.find(({ name }) => name === "bert.encoder.layer.1.attention.self.query.bias")!;
  t.equal(query.initializer, "bert.embeddings.LayerNorm.bias");
  const namesOf = (initializer: string, all = parameters): string[] =>
    all.filter((one) => one.initializer === initializer).map(({ name }) => name);
  t.ok(namesOf(query.initializer).includes("bert.pooler.dense.bias"));
  t.strictSame(
    query.uses.map(({ node }) => node.name),
    ["/bert/encoder/layer.1/attention/self/query/Add"],
  );
  const weight = parameters.find(({ name }) => name === "bert.encoder.layer.1.attention.self.query.weight")!;
  t.strictSame(namesOf(weight.initializer), [weight.name]);

  for (const name of ["tied-torchscript-unfolded", "tied-dynamo-unfolded"]) {
    const tied = findParameters(parseModel(modelOf(name), name));
    const { initializer } = tied.find(({ name }) => name === "embed.weight")!;
    t.strictSame(namesOf(initializer, tied).sort(), ["embed.weight", "head.weight"], name);
  }
  t.end();
});

t.test("a layer that runs twice is one parameter with two uses", (t) => {
  for (const name of EXPORTS.filter((name) => name.startsWith("tied"))) {
    const layer = findParameters(parseModel(modelOf(name), name)).filter(({ name }) => name.startsWith("layer"));
    const uses = Object.fromEntries(layer.map(({ name, uses }) => [name, uses.length]));
    t.strictSame(uses, { "layer.bias": 2, "layer.weight": 2 }, name);
  }
  t.end();
});

t.test("quantised weights are parameters, but nothing that a host can read as numbers", async (t) => {
  const parameters = findParameters(parseModel(modelOf("by-hand"), "model"));
  const { dtype, layout, shape } = parameters.find(({ name }) => name === "dequantised.weight")!;
  t.strictSame({ dtype, layout, shape }, { dtype: "other", layout: "in-out", shape: [4, 4] });
  const host = await openOnnxHost(modelOf("by-hand"));
  t.notOk([...host.list()].some(({ name }) => name === "dequantised.weight"));
  await t.rejects(host.read("dequantised.weight"), { tag: "source", message: /no float parameter/ });
});

t.test("without node names and metadata, a linear layer is known by its bias", async (t) => {
  const model = parseModel(modelOf("bert-dynamo"), "model");
  for (const node of model.proto.graph!.node) {
    node.name = "";
    node.metadataProps = [];
  }
  const host = await openOnnxHost(toBinary("ModelProto", model.proto));
  t.strictSame(await differences(host, digestsOf(`${DATA}/bert-dynamo.json`)), []);
});

t.test("what the schema leaves out survives writing", (t) => {
  for (const name of EXPORTS) {
    const file = modelOf(name);
    const written = toBinary("ModelProto", parseModel(file, name).proto);
    // Fields may be reordered, so the bytes are compared as a multiset: with the length, any lost or altered field
    // shows.
    t.strictSame(written.toSorted(), file.toSorted(), name);
  }
  t.end();
});

t.test("external data", async (t) => {
  const digests = digestsOf(`${DATA}/external.json`);
  const values = new Uint8Array(readFileSync(`${DATA}/external.onnx.data`));
  const asked: string[] = [];
  const given = await openOnnxHost(modelOf("external"), { external: (location) => (asked.push(location), values) });
  t.strictSame(asked, [], "nothing is read before a weight is");
  t.strictSame(await differences(given, digests), []);
  t.strictSame(asked, ["external.onnx.data"], "opened once");
  t.equal(((await given.read("up.weight")).data as Uint8Array).buffer, values.buffer, "a view");

  const bytes = await openOnnxHost(modelOf("external"));
  t.equal([...bytes.list()].length, 4, "shapes need no data");
  const missing = await bytes.read("up.weight").catch((error: unknown) => error);
  t.ok(missing instanceof SourceError);
  t.match(missing, { message: /"external\.onnx\.data".*option `external`/ });

  const short = await openOnnxHost(modelOf("external"), { external: () => values.subarray(0, 100) });
  await t.rejects(short.read("up.weight"), { tag: "source", message: /truncated/ });
  let fails = true;
  const later = await openOnnxHost(modelOf("external"), {
    external: () => (fails ? Promise.reject(new SourceError("is not there", { file: "x" })) : values),
  });
  await t.rejects(later.read("up.weight"), { message: /is not there/ });
  fails = false;
  t.ok(await later.read("up.weight"), "a failure is not kept");

  const alter = (key: string, value: string): Uint8Array => {
    const { proto } = parseModel(modelOf("external"), "model");
    for (const entry of proto.graph!.initializer.flatMap(({ externalData }) => externalData)) {
      if (entry.key === key) entry.value = value;
    }
    return toBinary("ModelProto", proto);
  };
  for (const wrong of ["offset=-4", "offset=0x", "length=1e300", "length=8", "location="]) {
    const [key, value] = wrong.split("=") as [string, string];
    const host = await openOnnxHost(alter(key, value), { external: () => values });
    await t.rejects(host.read("up.weight"), { tag: "format", message: /initializer up\.weight/ }, wrong);
  }
  const beyond = await openOnnxHost(alter("offset", "99999"), { external: () => values });
  await t.rejects(beyond.read("up.weight"), { tag: "source", message: /truncated/ });
});

t.test("files beside the model are found, files elsewhere are not touched", async (t) => {
  const evil = (location: string): Uint8Array => {
    const { proto } = parseModel(modelOf("external"), "model");
    for (const { externalData } of proto.graph!.initializer) externalData[0]!.value = location;
    return toBinary("ModelProto", proto);
  };
  for (const location of ["../b", "/etc/hostname", "a/../../b", "C:\\b", "http://host.example/b", "..\\b"]) {
    const folder = t.testdir({ "model.onnx": Buffer.from(evil(location)) });
    const host = await openOnnxHost(`${folder}/model.onnx`);
    await t.rejects(host.read("up.weight"), { tag: "format", message: /outside the model's folder/ }, location);
  }
  const requests: string[] = [];
  // A model is read by one plain request, its weights by ranges.
  const fetcher = (async (url: string, { headers }: { headers: Record<string, string> }) => {
    const range = /bytes=(\d+)-(\d+)/.exec(new Headers(headers).get("range") ?? "");
    requests.push(`${range ? "part" : "whole"} ${url}`);
    const file = readFileSync(`${DATA}/${new URL(url).pathname.split("/").at(-1)}`);
    if (!range) return new Response(file);
    const [from, to] = [Number(range[1]), Number(range[2])];
    const answer = { "content-range": `bytes ${from}-${to}/${file.length}` };
    return new Response(file.subarray(from, to + 1), { status: 206, headers: answer });
  }) as unknown as typeof fetch;
  const remote = await openOnnxHost("https://host.example/models/external.onnx?v=2", { fetch: fetcher });
  t.strictSame(await differences(remote, digestsOf(`${DATA}/external.json`)), []);
  t.equal(requests[0], "whole https://host.example/models/external.onnx?v=2", "the model itself by one request");
  t.ok(requests.slice(1).every((request) => request === "part https://host.example/models/external.onnx.data"));
});

t.test("damaged files", async (t) => {
  for (const name of EXPORTS) {
    const file = modelOf(name);
    for (let i = 0; i < 40; i++) {
      const end = Math.floor((i * file.length) / 40);
      const cut = file.subarray(0, end);
      t.throws(() => parseModel(cut, "model"), { tag: "format", message: /^model, / }, `${name} cut at ${end}`);
    }
  }
  const text = new TextEncoder().encode("<!doctype html><html><body>404 Not Found</body></html>");
  t.throws(() => parseModel(text, "page.onnx"), { tag: "format", message: /^page\.onnx, model: .*no ONNX model/ });
  t.throws(() => parseModel(new Uint8Array(4096), "zeros"), { tag: "format", message: /no ONNX model/ });
  t.throws(() => parseModel(new Uint8Array(0), "empty"), { message: /empty, model: holds no graph/ });
  await t.rejects(openOnnxHost(text), { tag: "format", message: /this is HTML, expected an ONNX model/ });
  await t.rejects(openOnnxHost(`${DATA}/none.onnx`), { tag: "source", message: /none\.onnx/ });

  /** The model after a change to its protobuf. */
  const changed = (change: (proto: ModelProto, graph: GraphProto) => void): Uint8Array => {
    const { proto } = parseModel(modelOf("gemms"), "model");
    change(proto, proto.graph!);
    return toBinary("ModelProto", proto);
  };
  for (const dims of [
    [-1n, 6n],
    [1n << 40n, 1n << 40n],
  ]) {
    const model = parseModel(
      changed((_, { initializer }) => (initializer[0]!.dims = dims)),
      "model",
    );
    t.throws(() => findParameters(model), { tag: "format", message: `impossible shape [${dims.join(", ")}]` });
  }
  const longer = await openOnnxHost(changed((_, { initializer }) => (initializer[0]!.dims = [11n, 6n])));
  await t.rejects(longer.read("up.weight"), { tag: "format", message: /f32 \[11, 6\] needs 264 bytes, found 240/ });
  const twice = changed((_, { node }) => (node[0]!.output = node.at(-1)!.output));
  t.throws(() => parseModel(twice, "model"), { tag: "format", message: /two origins/ });
  const noOpset = changed(({ opsetImport }) => (opsetImport[0]!.domain = "com.microsoft"));
  t.throws(() => parseModel(noOpset, "model"), { tag: "format", message: /opset/ });
});

t.test("no bytes make it fail otherwise than with its own errors", async (t) => {
  const files = ["gemms", "by-hand", "tied-dynamo", "external"].map(modelOf);
  const hostile = fc.tuple(fc.constantFrom(...files), fc.array(fc.tuple(fc.nat(), fc.nat(255)), { maxLength: 8 }));
  await fc.assert(
    fc.asyncProperty(hostile, async ([file, changes]) => {
      const bytes = file.slice();
      for (const [at, value] of changes) bytes[at % bytes.length] = value;
      try {
        const host = await openOnnxHost(bytes);
        for (const { name } of host.list()) await host.read(name);
      } catch (error) {
        if (!(error instanceof EigenLoraError)) throw error;
      }
    }),
    { numRuns: runs(2000) },
  );
  // Branches whose values have names of the surrounding graph.
  const { proto } = parseModel(modelOf("by-hand"), "model");
  const branch = proto.graph!.node.at(-1)!.attribute[0]!.g!;
  const node = proto.graph!.node.find(({ opType }) => opType === "Cast")!;
  branch.node.push({ ...node, input: ["branch"], output: ["there"] });
  branch.node.push({ ...node, input: ["there"], output: ["branch"] });
  t.ok(findParameters(parseModel(toBinary("ModelProto", proto), "model")));
});

/**
 * Models whose weights stay in their file: the skeleton means the same, and only the bytes between the weights are
 * read.
 */
const NAME = "model.onnx";
const MODELS = ["sessions/torchscript", "sessions/dynamo", "sessions/branches", "sessions/q4", "builder/llama-int4"];

/** Counts read bytes. */
async function counted(bytes: Uint8Array): Promise<{ source: ByteSource; read: () => number }> {
  const whole = await openSource(bytes);
  let total = 0;
  const read: ByteSource["read"] = (offset, length, options) => {
    total += length;
    return whole.read(offset, length, options);
  };
  return { source: { name: NAME, byteLength: bytes.length, read }, read: () => total };
}

t.test("the same graph, and the same bytes of every weight", async (t) => {
  for (const name of [...MODELS, "minilm/model_fp16"]) {
    const bytes = new Uint8Array(readFileSync(data(`${name}.onnx`)));
    const { source, read } = await counted(bytes);
    const skeleton = await skeletonOf(source, NAME);
    if (name.startsWith("minilm")) {
      t.ok(read() < bytes.length / 10, `${name}: ${read()} of ${bytes.length} bytes are read`);
      t.ok(skeleton!.length < bytes.length / 10, `${skeleton!.length} of ${bytes.length} bytes are kept`);
    }
    const [apart, whole] = [parseModel(skeleton!, NAME), parseModel(bytes, NAME)];
    t.equal(apart.opset, whole.opset);
    t.strictSame(apart.graph.proto.node, whole.graph.proto.node, `${name}: nodes`);
    t.strictSame(
      [apart.graph.proto.input, apart.graph.proto.output],
      [whole.graph.proto.input, whole.graph.proto.output],
    );
    t.strictSame([...apart.graph.initializers.keys()], [...whole.graph.initializers.keys()]);
    let moved = 0;
    for (const [key, tensor] of apart.graph.initializers) {
      const expected = whole.graph.initializers.get(key)!;
      t.strictSame([tensor.dims, tensor.dataType], [expected.dims, expected.dataType]);
      const found = await readTensor(tensor, NAME, async () => openSource(bytes));
      const { data: values } = await readTensor(expected, NAME);
      if (!Buffer.from(found.data).equals(values)) t.fail(`${name}: "${key}" has other bytes`);
      moved += Number(tensor.rawData.length < expected.rawData.length);
    }
    t.ok(moved > 0 || name.startsWith("sessions"), `${name}: ${moved} weights stay in the file`);
  }
});

function parses(bytes: Uint8Array): boolean {
  try {
    return parseModel(bytes, NAME).opset > 0;
  } catch {
    return false;
  }
}

t.test("files that end early, or are something else, are left to whoever reads them whole", async (t) => {
  const bytes = new Uint8Array(readFileSync(data("builder/llama-int4.onnx")));
  for (let end = bytes.length - 1; end > 0; end = Math.floor(end * 0.93)) {
    const part = bytes.subarray(0, end);
    const skeleton = await skeletonOf(await openSource(part), NAME);
    t.equal(skeleton !== undefined && parses(skeleton), parses(part), `${end} bytes of ${bytes.length}`);
  }
  let state = 1;
  for (let i = 0; i < 200; i++) {
    const noise = Uint8Array.from({ length: 3000 }, () => (state = (state * 48_271) % 2_147_483_647) & 255);
    // Resolves for any bytes.
    const skeleton = await skeletonOf(await openSource(noise), NAME);
    if (skeleton) t.ok(skeleton.length <= noise.length);
  }
  t.equal(await skeletonOf(await openSource(new TextEncoder().encode("no model")), NAME), undefined);
});
