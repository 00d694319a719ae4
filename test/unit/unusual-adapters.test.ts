/**
 * Adapters that are valid and seldom: heads alone, magnitudes alone, modules that others leave alone, more rows than a pack holds. What is
 * packed is read back, and what is added keeps to what the pack says.
 */
import { openPack, type Pack } from "eigenlora";
import { type Adapter, type BuildOptions, buildPack, projectAdapters, searchPack } from "eigenlora/build";
import t from "tap";
import { adapterOf, linear } from "../support/adapters.ts";
import { uniform } from "../support/internals/base.ts";
import { readDonor, sharedRows, startState, TrainedTerms } from "../support/internals/learn.ts";
import { completeDtypes } from "../support/internals/pack.ts";
import { concat } from "../support/packs.ts";

const [OUT, IN] = [32, 24];

/** @param names of modules; "still" ones have B = 0. @param magnitude whether they are DoRA's */
function adapter(
  id: string,
  seed: number,
  names: readonly string[] = ["a", "b"],
  { rank = 2, still = false, magnitude = false, saved = [] as Adapter["saved"] } = {},
): Adapter {
  const next = uniform(seed);
  const values = (length: number, zero = false): Float32Array =>
    Float32Array.from({ length }, () => (zero ? 0 : next() - 0.5));
  const modules = names.map((name) => {
    const term = {
      rank,
      A: values(rank * IN),
      Bt: values(rank * OUT, still),
      ...(magnitude && { magnitude: values(OUT).map((value) => 1 + value) }),
    };
    return linear(name, OUT, IN, term);
  });
  return adapterOf(id, modules, { byteLength: 1000, saved });
}

const opened = async (chunks: readonly Uint8Array[]): Promise<Pack> => openPack(concat(chunks));
const packed = async (adapters: readonly Adapter[], options?: BuildOptions): Promise<Pack> =>
  opened((await buildPack(adapters, options)).chunks);

t.test("what is added keeps to the error that a pack states, whatever its other tasks need", async (t) => {
  const several = [1, 2, 3].map((seed) => adapter(`t${seed}`, seed, ["a", "b"], { rank: 4 }));
  const still = adapter("still", 9, ["a", "b"], { rank: 4, still: true });
  const { chunks } = await searchPack([...several, still], { goal: { kind: "error", max: 0.2 } });
  const pack = await opened(chunks);
  t.equal(pack.directory.basis.error, 0.2);
  const newcomer = adapter("new", 7, ["a", "b"], { rank: 4 });
  const [made] = await projectAdapters(pack, [newcomer], completeDtypes());
  t.ok(made!.residual.total <= 0.2, `${made!.residual.total}`);
});

t.test("training begins with the task itself, and loses nothing of it", async (t) => {
  const bias = { name: "a.bias", role: "bias" as const, shape: [OUT], read: async () => new Float32Array(OUT).fill(1) };
  const all = [
    adapter("x", 1),
    adapter("y", 2),
    adapter("only a", 3, ["a"]),
    adapter("biased", 4, ["a"], { saved: [bias] }),
  ];
  const pack = await packed(all, { gauge: "balanced", centering: "none", select: { kind: "k", k: 4 } });
  const bases = await pack.bases();
  const termsFor = (names: readonly string[]): TrainedTerms =>
    new TrainedTerms(
      pack.modules
        .filter(({ name }) => names.includes(name))
        .map((one) => ({
          name: one.name,
          in: one.in,
          out: one.out,
          privateRank: 0,
          shared: sharedRows(one, bases.bytes, 2),
        })),
    );
  const factors = new TrainedTerms(
    pack.modules.map(({ name, in: inputs, out }) => ({ name, in: inputs, out, privateRank: 2, shared: undefined })),
  );
  const start = async (names: readonly string[], task: string) => {
    const terms = termsFor(names);
    const setup = { pack, terms, origin: terms, model: { head: [] }, labels: [] } as never;
    return terms.expand((await startState(setup, await readDonor(pack, task), uniform(5))).parameters);
  };
  const norm = ({ A, Bt }: { A: Float32Array; Bt: Float32Array }): number => Math.hypot(...A) * Math.hypot(...Bt);
  const found = await start(["a", "b"], "only a");
  t.ok(norm(found.get("a")!) > 0.1);
  t.equal(norm(found.get("b")!), 0, "a module that the task leaves alone");
  const setup = { pack, terms: factors, origin: termsFor(["a", "b"]), model: { head: [] }, labels: [] } as never;
  const lora = factors.expand((await startState(setup, await readDonor(pack, "only a"), uniform(5))).parameters);
  t.ok(norm(lora.get("a")!) > 0.1 && norm(lora.get("b")!) === 0, "as a LoRA too");
  await t.rejects(start(["a"], "x"), /task "x" has terms of "b", which this trainer does not have/);
  await t.rejects(start(["a"], "biased"), /task "biased" has "a.bias" \(bias\), which this trainer does not have/);
  bases.close();
});
