/**
 * The command distill with --part: adapters projected onto a basis and distilled on one machine of many, as a part for assemble
 * (docs/hub.md). Loaded when it is asked for.
 */
import { createHash } from "node:crypto";
import { createReadStream } from "node:fs";
import type { Adapter } from "../adapters/adapter.ts";
import { TaskError } from "../errors.ts";
import type { Pack } from "../pack/pack.ts";
import { completeDtypes } from "../pack/recipe.ts";
import { byId, openTasks, writeTasks } from "../pack/shard/tasks.ts";
import type { Dtypes } from "../tensor/dtypes.ts";
import type { Result } from "./command.ts";
import { readQuestions } from "./examples.ts";
import { addProjected, type Done, distilEach, figuresOf, removeFinished, tableOf } from "./finished.ts";
import type { match } from "./matching.ts";
import { openTrainable, tokenizerOf } from "./model.ts";
import type { Values } from "./options.ts";
import { type Output, warnOf } from "./output.ts";
import { contents, digest, facts, makePart } from "./parts.ts";
import type { Run } from "./run.ts";
import { checkTarget, filesOf, stat } from "./target.ts";
import { refuseOtherBase } from "./tasks.ts";

/** Those of the command that a part depends on. */
interface PartOptions extends Values<typeof match> {
  readonly output: string;
  readonly force: boolean;
  readonly text: string;
  readonly steps: number;
  readonly batch: number;
  readonly dtype: Partial<Dtypes> | undefined;
  readonly as: ReadonlyMap<string, string>;
  readonly base: string | undefined;
  readonly model: string;
  readonly decoder: string | undefined;
  readonly tokens: number | undefined;
  readonly tokenizer: string | undefined;
  readonly anyBase: boolean;
}

export async function distilPart(
  [basisPath, ...paths]: [string, ...string[]],
  options: PartOptions,
  run: Run,
  out: Output,
): Promise<Result> {
  const { output: file, force, model, decoder, steps, batch, tokens = 128, tokenizer = tokenizerOf(model) } = options;
  const questions = await readQuestions(options.text);
  checkTarget(file, { force: true, inputs: [basisPath, model, decoder, options.text, tokenizer] });
  const adapters = byId(await run.adapters(paths, options.as, options.base));
  checkTarget(file, { force: true, inputs: adapters.flatMap(filesOf) });
  const basis = await run.pack(basisPath);
  refuseTaken(basis, adapters);
  refuseOtherBase(basis, adapters, options.anyBase);
  const types = completeDtypes(options.dtype);
  const { coefficients, head } = types;
  const matching = { names: [...options.names], ignore: options.ignore };
  // By content: other machines may have the files elsewhere.
  const asked = { model: await digestOf(model), tokenizer: await digestOf(tokenizer), steps, batch, tokens };
  const half = decoder && { decoder: await digestOf(decoder) };
  const settings = { ...asked, ...half, ...questions, ...matching };
  const of = [basis.basisId, coefficients, head, await facts(options.base), await contents(adapters, out)];
  const made = digest("distill", ...of, settings);
  const finished = `${file}.partial`;
  let done: readonly Done[] | undefined;
  const figures = { adapters: adapters.length, modules: basis.modules.length, warnings: warnOf(adapters, out) };
  const { json, text } = await makePart({ file, force, kind: "tasks", made }, figures, async () => {
    const losses = (await addProjected(basis, adapters, types)).map(({ residual }) => residual);
    const whole = questions.examples !== undefined;
    const { session, encode } = await openTrainable("distill", model, basis, options, run, whole);
    run.folder(finished);
    done = await distilEach(basis, adapters, { session, encode, questions, steps, batch, settings, finished }, out);
    return writeTasks(
      basis,
      made,
      types,
      losses,
      done.map((one) => one.file),
    );
  });
  await removeFinished(finished);
  const { tasks: residual } = run.closing(await openTasks(file));
  if (!done) return { json: { ...json, residual }, text };
  return { json: { ...json, residual, tasks: figuresOf(done, new Set()) }, text: [...text, ...tableOf(done)] };
}

/** @throws TaskError for a task that the basis has: assemble would refuse it, when all is done */
function refuseTaken({ tasks, name }: Pack, adapters: readonly Adapter[]): void {
  const taken = adapters.find(({ id }) => tasks.has(id));
  if (!taken) return;
  const message = `${name} has a task "${taken.id}" already, which a part cannot replace; rename the new one: --as ${taken.id}=NEW`;
  throw new TaskError(message, { task: taken.id });
}

/** What a file holds; null where there is none: whoever needs it says so. */
async function digestOf(path: string): Promise<string | null> {
  if (!stat(path)?.isFile()) return null;
  const hash = createHash("sha256");
  try {
    for await (const chunk of createReadStream(path)) hash.update(chunk as Uint8Array);
  } catch {
    return null;
  }
  return hash.digest("hex");
}
