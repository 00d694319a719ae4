/**
 * Runs examples in the current folder, each a module with a function of the values it assumes. Started by
 * test/pages/examples.test.ts.
 */
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";
import { Absent, forget, values } from "./values.js";

// The server that examples read from.
const files = globalThis.fetch;
globalThis.fetch = async (/** @type {string | URL | Request} */ input, /** @type {RequestInit | undefined} */ init) => {
  const url = String(input instanceof Request ? input.url : input);
  if (!url.startsWith("https://example.org/")) return files(input, init);
  const bytes = readFileSync(new URL(url).pathname.slice(1));
  const version = { etag: '"1"' };
  const range = /bytes=(\d+)-(\d+)/.exec(new Headers(init?.headers).get("range") ?? "");
  if (!range) return new Response(bytes, { headers: { ...version, "content-length": String(bytes.length) } });
  const [from, to] = [Number(range[1]), Math.min(Number(range[2]), bytes.length - 1)];
  return new Response(bytes.subarray(from, to + 1), {
    status: 206,
    headers: {
      ...version,
      "content-range": `bytes ${from}-${to}/${bytes.length}`,
      "content-length": String(to + 1 - from),
    },
  });
};

/** @type {{ file: string, names: (keyof typeof values)[] }[]} */
const examples = JSON.parse(readFileSync("examples.json", "utf8"));
/** @type {{ error?: string, absent?: string }[]} */
const results = [];
for (const { file, names } of examples) {
  forget();
  try {
    /** @type {Record<string, unknown>} */
    const given = {};
    for (const name of names) given[name] = await values[name]();
    await (await import(pathToFileURL(file).href)).default(given);
    results.push({});
  } catch (error) {
    const { stack, message } = /** @type {Error} */ (error);
    if (error instanceof Absent) results.push({ absent: message });
    else if (/Cannot find package '@huggingface\/transformers'/.test(message))
      results.push({ absent: "transformers.js" });
    else results.push({ error: stack ?? message });
  }
}
process.stdout.write(`\n${JSON.stringify(results)}\n`, () => process.exit());
