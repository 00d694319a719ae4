// One language model and the skills of a pack, by transformers.js. The same lines run in Node and in browsers.
import { pipeline, TextStreamer } from "@huggingface/transformers";
import { openPack } from "eigenlora";
import { attachPack } from "eigenlora/transformers";

/** @typedef {Record<string, string>} Prompts by skill: "Plural: {input} →" */

/**
 * @param {string} model as its folder is called
 * @param {string} file of the pack: path or URL
 * @param {Prompts} prompts
 */
export async function openSkills(model, file, prompts) {
  const pipe = await pipeline("text-generation", model, { dtype: "q4" });
  const pack = await openPack(file);
  const tasks = await attachPack(pipe, pack, { model });
  return {
    names: [...tasks.tasks.keys()],

    /**
     * @param {string} skill
     * @param {string} text
     * @param {(piece: string) => void} onText takes the answer, piece by piece
     */
    async answer(skill, text, onText) {
      const prompt = (prompts[skill] ?? `${skill}: {input} →`).replace("{input}", () => text);
      const streamer = new TextStreamer(pipe.tokenizer, {
        skip_prompt: true,
        skip_special_tokens: true,
        callback_function: onText,
      });
      const options = { max_new_tokens: 24, do_sample: false, return_full_text: false, streamer };
      // Not awaited in between: so the call belongs to this skill, whatever else is asked for meanwhile.
      const switching = tasks.switchTask(skill);
      const [{ milliseconds, requests }] = await Promise.all([switching, pipe(prompt, options)]);
      return { milliseconds: milliseconds.total, requests };
    },

    async close() {
      await pipe.dispose();
      await pack.close();
    },
  };
}
