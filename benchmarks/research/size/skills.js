/** The twenty skills of SmolLM2-135M-Instruct as a suite. A row is right if its whole greedy answer is. */
import * as ort from "onnxruntime-node";
import { createEncode, force, questionsOf, readAnswers, readSkills, smollm2File } from "../../lib/skills.js";
import { Suite } from "./suite.js";

/**
 * @typedef {import("../../lib/skills.js").Question} Question
 * @typedef {import("./suite.js").Answers} Answers
 */

export class Skills extends Suite {
  /** @type {Map<string, { questions: Question[], peft: boolean[] }> | undefined} */
  #asked;

  /** @override */
  get model() {
    return smollm2File("onnx/model.onnx");
  }

  /** @override */
  get sizes() {
    return [this.adapters.length];
  }

  /** Test rows of each task, and whether PEFT's adapter answers them right. */
  async #rows() {
    if (this.#asked) return this.#asked;
    const [skills, answers, encode] = await Promise.all([readSkills(), readAnswers(), createEncode()]);
    this.#asked = new Map();
    for (const { id } of this.adapters) {
      const skill = skills.get(id);
      const told = answers.adapters[`adapters/${id}`]?.answers;
      if (!skill || !told) throw new Error(`${id}: no such task; there are ${[...skills.keys()].join(", ")}`);
      const questions = questionsOf(skill, encode);
      const peft = questions.map(({ answer }, row) => String(answer) === String(told[row]));
      this.#asked.set(id, { questions, peft });
    }
    return this.#asked;
  }

  /** @override @param {string} id */
  async rowsOf(id) {
    return (await this.#rows()).get(id)?.questions.length ?? NaN;
  }

  /**
   * @override
   * @param {import("./suite.js").Session} session
   * @param {string} id
   * @param {Parameters<import("./suite.js").Session["switchTask"]>[0]} [task]
   * @returns {Promise<Answers>} `same`: rows that are right or wrong as PEFT's are
   */
  async ask(session, id, task = id) {
    const { questions, peft } = /** @type {{ questions: Question[], peft: boolean[] }} */ (
      (await this.#rows()).get(id)
    );
    await session.switchTask(task);
    const forced = await force(ort, session, questions);
    const same = forced.filter(({ exact }, row) => exact === peft[row]).length;
    return { right: forced.filter(({ exact }) => exact).length, same };
  }

  /** @override PEFT's own answers */
  async reference() {
    const rows = await this.#rows();
    return this.adapters.map(({ id }) => {
      const peft = rows.get(id)?.peft ?? [];
      return peft.filter(Boolean).length / peft.length;
    });
  }
}
