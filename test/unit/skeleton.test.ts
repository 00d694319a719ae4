/** Models whose weights stay in their file: the skeleton means the same, and only the bytes between the weights are read. */
import { readFileSync } from "node:fs";
import type { ByteSource } from "eigenlora";
import t from "tap";
import { openSource } from "../support/internals/base.ts";
import { parseModel, readOnnxTensor as readTensor, skeletonOf } from "../support/internals/models.ts";
import { data } from "../support/packs.ts";

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
