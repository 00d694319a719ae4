/** A pack on pipelines of transformers.js in a browser: returns answers for `transformers.test.ts` to judge. */

/**
 * @param {any} transformers the module @huggingface/transformers, with `env` set up
 * @param {Pick<typeof import("eigenlora"), "openPack"> & Pick<typeof import("eigenlora/transformers"), "attachPack">}
 *   eigenlora
 * @param {{ device: string, read: (file: string) => Promise<Uint8Array>, prompts: string[], questions: string[], texts:
 *   string[], topics: string[] }} plan
 */
export async function smoke(
  { pipeline, Tensor },
  { openPack, attachPack },
  { device, read, prompts, questions, texts, topics },
) {
  const generator = await pipeline("text-generation", "decoder", { device, dtype: "fp32" });
  const writers = await attachPack(generator, await openPack(await read("decoder.eigen")), { model: "decoder" });
  const generated = [];
  for (const task of [null, "upper", "lower", "upper", null]) {
    await writers.switchTask(task);
    for (const prompt of prompts) {
      const tokens = generator.tokenizer(prompt);
      const ids = await generator.model.generate({ ...tokens, max_new_tokens: 12, do_sample: false });
      generated.push({
        task: task ?? "base",
        prompt,
        ids: ids.tolist()[0].map(Number).slice(tokens.input_ids.dims[1]),
      });
    }
  }
  await generator.dispose();

  const reader = await pipeline("text2text-generation", "seq2seq", { device, dtype: "fp32" });
  const readers = await attachPack(reader, await openPack(await read("seq2seq.eigen")), { model: "seq2seq" });
  const answered = [];
  for (const task of [null, "answers", "titles", "answers", "closed"]) {
    if (task === "closed") await readers.close();
    else await readers.switchTask(task);
    for (const prompt of questions) {
      const ids = await reader.model.generate({ ...reader.tokenizer(prompt), max_new_tokens: 12 });
      const asked = task === "closed" ? "base" : (task ?? "base");
      answered.push({ task: asked, prompt, ids: ids.tolist()[0].map(Number).slice(1) });
    }
  }
  await reader.dispose();

  const classifier = await pipeline("text-classification", "minilm", { device, dtype: "fp16" });
  const classes = await attachPack(classifier, await openPack(await read("minilm.eigen")), { model: "minilm" });
  /** @type {{ task: string, text: string, label: string }[]} */
  const labelled = [];
  const ask = async (/** @type {string} */ task, /** @type {string} */ text) => {
    const [{ label }] = await classifier(text);
    labelled.push({ task, text, label });
  };
  /** @type {Promise<unknown>[]} */
  const work = [];
  for (const task of topics) {
    // Each call must use the task that was asked for before it, awaited or not.
    work.push(classes.switchTask(task));
    for (const text of texts) work.push(ask(task, text));
  }
  await Promise.all(work);
  const probe = classes.session.probe.result;
  await classes.close();
  const [{ label: detached }] = await classifier(texts[0]);
  await classifier.dispose();
  return { generated, answered, labelled, probe, detached, logits: await external() };

  async function external() {
    const pipe = await pipeline("text-classification", "external", { device, dtype: "fp32" });
    const tasks = await attachPack(pipe, await openPack(await read("tiny.eigen")), { model: "external" });
    await tasks.switchTask("three");
    const row = (/** @type {number[]} */ ...values) =>
      new Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
    const { logits } = await pipe.model({
      input_ids: row(2, 17, 5, 40, 9, 33, 3),
      attention_mask: row(1, 1, 1, 1, 1, 1, 1),
      token_type_ids: row(0, 0, 0, 0, 1, 1, 1),
    });
    await pipe.dispose();
    return logits.tolist()[0];
  }
}
