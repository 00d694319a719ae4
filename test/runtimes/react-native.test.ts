/**
 * `eigenlora/react-native`: files of the app, and sessions on onnxruntime-react-native, emulated over onnxruntime-node
 * (test/support/react-native-ort.ts). Metro and Hermes are in test/runtimes/engines.test.ts.
 */
import { openPack } from "eigenlora";
import { createEigenSession } from "eigenlora/onnxruntime";
import { fileSource, fromBase64 } from "eigenlora/react-native";
import { createEigenSession as createNativeSession } from "eigenlora/react-native/onnxruntime";
import t from "tap";
import { folderFor } from "../support/folder.ts";
import { folderFiles, nativeOrt } from "../support/react-native-ort.ts";
import { difference, feeds, golden, MODES, modelBytes, NODE, packBytes, packFor } from "../support/sessions.ts";

const bytes = await packBytes(["adapters"], "base");
const base64 = Buffer.from(bytes).toString("base64");
const ids = [...(await openPack(bytes)).tasks.keys()];

t.test("a pack from base64, with the line breaks that libraries put in", async (t) => {
  const lines = base64.replace(/.{76}/g, "$&\r\n");
  t.same([...(await openPack(fromBase64(lines))).tasks.keys()], ids);
  t.throws(() => fromBase64("päck"), { name: "RangeError", message: "it is not base64" });
  t.throws(() => fromBase64(undefined as never), { message: "fromBase64: expected a string, got undefined" });
});

t.test("a file is read part by part, as bytes or base64", async (t) => {
  for (const how of ["Uint8Array", "ArrayBuffer", "base64"] as const) {
    let reads = 0;
    const source = fileSource({
      name: "file:///app/tasks.eigen",
      byteLength: bytes.length,
      async read(offset, length) {
        reads++;
        const part = bytes.slice(offset, offset + length);
        return how === "Uint8Array" ? part : how === "ArrayBuffer" ? part.buffer : Buffer.from(part).toString("base64");
      },
    });
    const pack = await openPack(source);
    t.equal(pack.name, "file:///app/tasks.eigen");
    t.equal(reads, 2, `${how}: window, directory with bases`);
    await pack.load(ids[0]!);
    t.equal(reads, 3, "and one for a task");
  }
});

t.test("a library that gives something else is named", async (t) => {
  const file = { name: "tasks.eigen", byteLength: bytes.length };
  const wrong = (read: () => Promise<unknown>) => openPack(fileSource({ ...file, read: read as never }));
  await t.rejects(
    wrong(async () => new Uint8Array(3)),
    {
      name: "SourceError",
      message: /^tasks\.eigen: its `read` gave 3 bytes, 1536 from 0 were asked for/,
    },
  );
  await t.rejects(
    wrong(async () => "ä"),
    { message: /gave neither bytes nor base64: it is not base64/ },
  );
  await t.rejects(
    wrong(async () => undefined),
    { message: /expected a string, got undefined/ },
  );
  await t.rejects(
    wrong(() => Promise.reject(new Error("ENOENT"))),
    { message: "tasks.eigen: cannot be read: ENOENT" },
  );
  t.throws(() => fileSource({ name: "x", read: async () => "" } as never), TypeError);
});

const folder = folderFor(t);

for (const mode of MODES) {
  t.test(`onnxruntime-react-native, emulated, mode ${mode}`, async (t) => {
    const loaded: (string | Uint8Array)[] = [];
    const [ort, files] = [nativeOrt(loaded), folderFiles(folder)];
    const pack = await packFor("base");
    const session = await createNativeSession(ort, modelBytes("torchscript"), pack, { files, mode });
    t.equal(session.mode, mode);
    for (const task of ["two", "three", null]) {
      await session.switchTask(task);
      // Inputs are slices of one buffer, which tokenizers may return.
      const given = Object.entries(feeds(NODE, session)).map(([name, { type, data, dims }]) => {
        const wide = new (data.constructor as new (length: number) => BigInt64Array)(data.length + 3);
        wide.set(data as BigInt64Array, 3);
        return [name, new NODE.Tensor(type as "int64", wide.subarray(3), dims)];
      });
      const results = await session.run(Object.fromEntries(given));
      const found = results[session.outputNames[0]!]!.data as Float32Array;
      t.ok(difference(found, golden("base", task)) < 1e-5, `${task}: PEFT's logits`);
    }
    t.ok(loaded.length > 0 && loaded.every((model) => typeof model === "string"), "every model by its path");
    t.ok(files.files.size > 0);
    await session.close();
    t.same([...files.files], [], "no file is left");
  });
}

t.test("the emulation refuses what the other binding does", async (t) => {
  const open = createEigenSession(nativeOrt([]), modelBytes("torchscript"), await packFor("base"), { mode: "factors" });
  await t.rejects(open, { name: "BackendError", message: /onnxruntime cannot load the model/ });
});

t.test("what keeps a model from loading is said, and leaves no file", async (t) => {
  const files = folderFiles(folder);
  const ort = nativeOrt([]);
  const full = { ...files, write: () => Promise.reject(new Error("the disk is full")) };
  const pack = await packFor("base");
  const open = (given: object) => createNativeSession(ort, modelBytes("torchscript"), pack, given as never);
  await t.rejects(open({ files: full }), { tag: "backend", message: /the disk is full/ });
  await t.rejects(open({}), { message: /files: expected \{ write, remove \}/ });
  await t.rejects(open({ files, session: { executionProviders: ["no such provider"] } }), {
    message: /cannot load the model.*no such provider/,
  });
  t.same([...files.files], []);
});
