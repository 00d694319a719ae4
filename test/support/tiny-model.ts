/** The tiny model of test/data/sessions for commands, which read its tokenizer and texts from files. */
import { writeFile } from "node:fs/promises";
import { uniform } from "./internals/base.ts";
import { data } from "./packs.ts";

const WORDS = [..."abcdefghijklmno"].flatMap((a) => [..."pqrs"].map((b) => a + b + a));

/** Writes a tokenizer of made-up words into the current folder. @returns options of commands that run the model */
export async function tinyModel(): Promise<string[]> {
  const vocab = Object.fromEntries(["[PAD]", ...WORDS].map((word, i) => [word, i]));
  const tokenizer = {
    ...{ version: "1.0", truncation: null, padding: null, added_tokens: [], normalizer: null, decoder: null },
    pre_tokenizer: { type: "WhitespaceSplit" },
    post_processor: null,
    model: { type: "WordLevel", vocab, unk_token: "[PAD]" },
  };
  await writeFile("tokenizer.json", JSON.stringify(tokenizer));
  await writeFile("tokenizer_config.json", JSON.stringify({ unk_token: "[PAD]" }));
  return ["--model", data("sessions/torchscript.onnx"), "--tokenizer", "tokenizer.json"];
}

/** Lines of its words. */
export function tinyLines(count: number): string[] {
  const random = uniform(7);
  return Array.from({ length: count }, () =>
    Array.from({ length: 7 }, () => WORDS[Math.floor(random() * WORDS.length)]).join(" "),
  );
}
