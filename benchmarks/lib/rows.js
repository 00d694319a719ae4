/**
 * Measured rows, one JSON object a line, so that an interrupted run can go on, and tables can be made of what there is. Of rows with the
 * same key the last one counts.
 */
import { appendFile, readFile, writeFile } from "node:fs/promises";

/** @template Row, [Cell=Row] */
export class Rows {
  /** @type {Map<string, Row>} */
  #rows = new Map();

  /** @param {string | URL} file @param {(cell: any) => string} keyOf what a row is about, as text */
  constructor(file, keyOf) {
    this.file = file;
    this.keyOf = keyOf;
  }

  /** Reads the rows of an earlier run. */
  async load() {
    const text = await readFile(this.file, "utf8").catch((error) =>
      error.code === "ENOENT" ? "" : Promise.reject(error),
    );
    // An interrupted run may have left half a line.
    const whole = text.slice(0, text.lastIndexOf("\n") + 1);
    if (whole.length < text.length) await writeFile(this.file, whole);
    for (const line of whole.split("\n").filter(Boolean)) this.#put(JSON.parse(line));
    return this;
  }

  /** @param {Row} row */
  #put(row) {
    this.#rows.set(this.keyOf(row), row);
  }

  /** @param {Row} row */
  async add(row) {
    this.#put(row);
    await appendFile(this.file, `${JSON.stringify(row)}\n`);
  }

  /** Writes each row once. */
  async save() {
    await writeFile(
      this.file,
      this.all()
        .map((row) => `${JSON.stringify(row)}\n`)
        .join(""),
    );
  }

  /** @param {Cell} cell */
  get(cell) {
    return this.#rows.get(this.keyOf(cell));
  }

  /** @returns {Row[]} */
  all() {
    return [...this.#rows.values()];
  }
}
