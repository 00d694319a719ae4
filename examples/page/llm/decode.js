/**
 * Greedy decoding with a cache of keys and values, several prompts at a time. Knows nothing of tasks, tokenizers and
 * the page: any session with `run` and `inputNames` works.
 */

const PAST = /^past_key_values\./;

/**
 * @typedef {object} Rules
 * @property {{ heads: number, width: number }} cache heads that hold keys and values, and the width of one
 * @property {readonly number[]} end tokens that end an answer
 * @property {number} most tokens of an answer
 */

/**
 * The answers to several prompts, one token of each at a time. Leave the loop to stop.
 * @param {Pick<typeof import("onnxruntime-common"), "Tensor">} ort
 * @param {{ inputNames: readonly string[], run(feeds: any, options?: any): Promise<any> }} session
 * @param {readonly (readonly number[])[]} prompts their tokens
 * @param {Rules} rules
 * @param {object} [options] of every run
 * @returns {AsyncGenerator<(number | undefined)[], void>} a token for each prompt; undefined where the answer has ended
 */
export async function* decode(ort, session, prompts, { cache, end, most }, options = {}) {
  const rows = prompts.length;
  const longest = Math.max(...prompts.map(({ length }) => length));
  // Answers begin where prompts end: short prompts are padded in front.
  const padded = (/** @type {readonly number[]} */ values, /** @type {number} */ by) => [
    ...Array(longest - values.length).fill(by),
    ...values,
  ];
  const mask = prompts.map((prompt) => padded(Array(prompt.length).fill(1), 0));
  let ids = prompts.map((prompt) => padded(prompt, end[0]));
  let positions = prompts.map((prompt) => padded([...prompt.keys()], 0));
  const int64 = (/** @type {number[][]} */ table) =>
    new ort.Tensor("int64", BigInt64Array.from(table.flat(), BigInt), [rows, table[0].length]);
  const past = new Map(
    session.inputNames
      .filter((name) => PAST.test(name))
      .map((name) => [name, new ort.Tensor("float32", new Float32Array(0), [rows, cache.heads, 0, cache.width])]),
  );
  const ended = prompts.map(() => false);
  for (let step = 0; step < most; step++) {
    const feeds = {
      input_ids: int64(ids),
      attention_mask: int64(mask),
      ...(session.inputNames.includes("position_ids") && { position_ids: int64(positions) }),
      ...Object.fromEntries(past),
    };
    const results = await session.run(feeds, options);
    const tokens = likeliest(results.logits);
    tokens.forEach((token, row) => (ended[row] ||= end.includes(token)));
    if (!ended.includes(false)) return;
    yield tokens.map((token, row) => (ended[row] ? undefined : token));
    for (const name of past.keys()) past.set(name, results[name.replace(PAST, "present.")]);
    ids = tokens.map((token) => [token]);
    positions = prompts.map((prompt) => [prompt.length + step]);
    for (const row of mask) row.push(1);
  }
}

/**
 * The token with the largest logit at the last position of each row.
 * @param {{ dims: readonly number[], data: unknown }} logits [rows, tokens, vocabulary]
 */
function likeliest({ dims: [rows, tokens, vocabulary], data }) {
  return Array.from({ length: rows }, (_, row) => {
    const start = (row * tokens + tokens - 1) * vocabulary;
    const last = /** @type {Float32Array} */ (data).subarray(start, start + vocabulary);
    let best = 0;
    for (let i = 1; i < vocabulary; i++) if (last[i] > last[best]) best = i;
    return best;
  });
}
