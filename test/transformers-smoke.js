/**
 * A pack on pipelines of transformers.js, on whatever onnxruntime that has: answers for `transformers.test.ts` to judge.
 */

/**
 * @param {any} transformers the module @huggingface/transformers, with `env` set up
 * @param {typeof import("../dist/src/index.js") & typeof import("../dist/bindings/transformers.js")} eigenlora
 * @param {{ device: string, read: (file: string) => Promise<Uint8Array>, prompts: string[], texts: string[], topics: string[] }} plan
 */
export async function smoke({ pipeline, Tensor }, { openPack, attachPack }, { device, read, prompts, texts, topics }) {
  const generator = await pipeline("text-generation", "decoder", { device, dtype: "fp32" });
  const writers = await attachPack(generator, await openPack(await read("decoder.eigen")), { model: "decoder" });
  const generated = [];
  for (const task of [null, "upper", "lower", "upper", null]) {
    await writers.switchTask(task);
    for (const prompt of prompts) {
      const ids = await generator.model.generate({ ...generator.tokenizer(prompt), max_new_tokens: 12, do_sample: false });
      generated.push({ task: task ?? "base", prompt, ids: ids.tolist()[0].map(Number).slice(generator.tokenizer(prompt).input_ids.dims[1]) });
    }
  }
  await generator.dispose();

  const classifier = await pipeline("text-classification", "minilm", { device, dtype: "fp16" });
  const classes = await attachPack(classifier, await openPack(await read("minilm.eigen")), { model: "minilm" });
  const answers = [];
  for (const task of topics) {
    // Calls and switches are not awaited one by one: each call must be of the task asked for before it.
    const switched = classes.switchTask(task);
    answers.push(...texts.map((text) => classifier(text).then(([{ label }]) => ({ task, text, label }))), switched.then(() => undefined));
  }
  const labelled = (await Promise.all(answers)).filter((answer) => answer !== undefined);
  const probe = classes.session.probe.result;
  await classes.detach();
  const [{ label: detached }] = await classifier(texts[0]);
  await classifier.dispose();

  const external = await pipeline("text-classification", "external", { device, dtype: "fp32" });
  const tiny = await attachPack(external, await openPack(await read("tiny.eigen")), { model: "external" });
  await tiny.switchTask("three");
  /** @param {number[]} values */
  const row = (...values) => new Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
  const { logits } = await external.model({ input_ids: row(2, 17, 5, 40, 9, 33, 3), attention_mask: row(1, 1, 1, 1, 1, 1, 1), token_type_ids: row(0, 0, 0, 0, 1, 1, 1) });
  await external.dispose();
  return { generated, labelled, probe, detached, logits: logits.tolist()[0] };
}
