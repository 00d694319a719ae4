/** The vectors of SPEC.md, section 6.3: tasks on bases, by the runtime, against values that its code had no part in. */
import { readFile } from "node:fs/promises";
import { createRuntime, EigenLoraError, type FloatDtype, openPack, type Runtime, type Tensor } from "eigenlora";
import t from "tap";
import { decodeTensor, openSafetensors, openSource } from "../support/internals/base.ts";

interface Application {
  readonly pack: string;
  readonly base: string;
  readonly why: string;
  /** Parameters under each of `tasks`. */
  readonly values?: string;
  readonly tasks?: readonly string[];
  /** Reasons by task. */
  readonly refused?: Readonly<Record<string, string>>;
}

const bytesOf = async (path: string): Promise<Uint8Array> =>
  new Uint8Array(await readFile(new URL(`../vectors/${path}`, import.meta.url)));
const index: Application[] = JSON.parse(new TextDecoder().decode(await bytesOf("apply.json")));

async function tensorsOf(path: string) {
  const file = await openSafetensors(await openSource(await bytesOf(path)));
  const found = new Map<string, { dtype: string; shape: readonly number[]; data: Uint8Array<ArrayBuffer> }>();
  for (const [name, { dtype, shape }] of file.tensors)
    found.set(name, { dtype, shape, data: (await file.read(name)).slice() });
  return found;
}

/** Parameters in memory of their own. */
async function baseOf(path: string): Promise<Map<string, Tensor>> {
  const tensors = [...(await tensorsOf(path))];
  return new Map(tensors.map(([name, one]) => [name, { ...one, dtype: one.dtype.toLowerCase() as FloatDtype }]));
}

async function valuesOf(path: string): Promise<Map<string, { shape: readonly number[]; values: Float64Array }>> {
  const tensors = [...(await tensorsOf(path))];
  return new Map(tensors.map(([name, { shape, data }]) => [name, { shape, values: new Float64Array(data.buffer) }]));
}

/** Values of a tensor of any length. */
function decoded({ dtype, shape, data }: Tensor): Float32Array {
  const count = shape.reduce((a, b) => a * b, 1);
  const padded = new Uint8Array(4 * count);
  padded.set(new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
  return decodeTensor(dtype, padded, 1, count);
}

const bitsOf = (base: ReadonlyMap<string, Tensor>): Map<string, string> =>
  new Map(
    [...base].map(([name, { shape, data }]) => [
      name,
      `${shape}: ${Buffer.from(data.buffer, data.byteOffset, data.byteLength).toString("hex")}`,
    ]),
  );

const failure = (work: Promise<unknown>): Promise<unknown> =>
  work.then(
    () => undefined,
    (error: unknown) => error,
  );

for (const backend of ["js", "wasm"] as const) {
  for (const { pack: path, base: basePath, why, values, tasks = [], refused = {} } of index) {
    t.test(`${backend}: ${why} (${basePath})`, async (t) => {
      const base = await baseOf(basePath);
      const pristine = bitsOf(base);
      const pack = await openPack(await bytesOf(path));
      const expected = values === undefined ? new Map() : await valuesOf(values);
      // Where a module of the pack does not fit, no task is taken.
      let runtime: Runtime | undefined;
      const error = await failure(createRuntime(pack, { base, backend }).then((made) => (runtime = made)));
      t.ok(runtime !== undefined || (error instanceof EigenLoraError && tasks.length === 0), `opens: ${error}`);
      let compared = 0;
      for (const id of tasks) {
        await runtime!.switchTask(id);
        for (const [name, tensor] of base) {
          const { shape, values } = expected.get(`${id}/${name}`)!;
          const bound = expected.get(`${id}/${name}/bound`);
          t.same(tensor.shape, shape, name);
          const found = decoded(tensor);
          const off = found.findIndex((value, i) => !(Math.abs(value - values[i]!) <= (bound?.values[i] ?? 0)));
          t.equal(
            off,
            -1,
            `${id}: ${name.slice(-40)}[${off}] is ${found[off]}, expected ${values[off]} ± ${bound?.values[off] ?? 0}`,
          );
          compared += bound ? 2 : 1;
        }
      }
      t.equal(compared, expected.size, "every value was reached");
      await runtime?.switchTask(null);
      t.same(bitsOf(base), pristine, "the base, bit for bit");
      for (const [id, why] of runtime ? Object.entries(refused) : []) {
        const error = await failure(runtime!.switchTask(id));
        t.ok(error instanceof EigenLoraError, `${id}: ${why}: ${error}`);
        t.same(bitsOf(base), pristine, "a refused task changes nothing");
      }
      await runtime?.close();
    });
  }
}
