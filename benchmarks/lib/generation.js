/** Tokens of a language model behind made-up ids. Runs in Node and in pages. */

/**
 * Greedy tokens behind a prompt, each cache fed to the next step.
 * @param {any} ort
 * @param {{ inputNames: readonly string[], run(feeds: any): Promise<any> }} session
 * @param {{ num_key_value_heads: number, head_size: number, halves?: boolean }} decoder halves: whether caches are f16
 * @param {number} length of the prompt
 */
export async function* generation(ort, session, decoder, length) {
  const { num_key_value_heads: heads, head_size: width, halves } = decoder;
  const Empty = halves ? Uint16Array : Float32Array;
  let tokens = Array.from({ length }, (_, i) => 500 + ((i * 37) % 4000));
  /** @type {Record<string, any> | undefined} */
  let cache;
  let past = 0;
  // Bits of f16, where there is no Float16Array, in the order of their numbers.
  const order = (/** @type {number} */ value) => (halves && value >= 0x8000 ? 0x8000 - value : value);
  while (true) {
    const mask = new BigInt64Array(past + tokens.length).fill(1n);
    /** @type {Record<string, any>} */
    const feeds = {
      input_ids: new ort.Tensor("int64", BigInt64Array.from(tokens, BigInt), [1, tokens.length]),
      attention_mask: new ort.Tensor("int64", mask, [1, mask.length]),
    };
    if (session.inputNames.includes("position_ids"))
      feeds.position_ids = new ort.Tensor(
        "int64",
        BigInt64Array.from(tokens, (_, j) => BigInt(past + j)),
        [1, tokens.length],
      );
    for (const name of session.inputNames.filter((one) => one.startsWith("past")))
      feeds[name] =
        cache?.[name.replace("past_key_values", "present")] ??
        new ort.Tensor(halves ? "float16" : "float32", new Empty(0), [1, heads, 0, width]);
    const results = await session.run(feeds);
    past += tokens.length;
    cache = results;
    const { data, dims } = results.logits;
    const last = data.subarray(data.length - dims[2]);
    let largest = 0;
    for (let j = 1; j < last.length; j++) if (order(last[j]) > order(last[largest])) largest = j;
    tokens = [largest];
    yield largest;
  }
}
