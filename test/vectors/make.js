// @ts-nocheck: it writes what no type allows
/** Writes the vectors: `node test/vectors/make.js`. The files are committed, and a test compares them. */
import { mkdir, rm, writeFile } from "node:fs/promises";
import { applyVectors } from "./apply.js";
import { integrity, KEYS, PACKS, stepOf, TASK_FILES } from "./invalid.js";
import { safetensors } from "./model.js";
import { VALID } from "./valid.js";

/** All files by path, `index.json` among them. */
export function vectors() {
  const files = new Map();
  const index = [];
  for (const [name, { bytes, expected, why, signed }] of Object.entries(VALID)) {
    const values =
      expected && `valid/${name.replace(/\.eigen(task)?$/, (end) => (end === ".eigen" ? "" : ".task"))}.safetensors`;
    files.set(`valid/${name}`, bytes);
    if (expected) files.set(values, safetensors(expected));
    const pack = name.endsWith(".eigen");
    const root =
      pack && !/^(no-hashes|torn|torn-signature|unflagged-signature|far-apart|other-places)\.|grown/.test(name);
    index.push({
      ...{ file: `valid/${name}`, valid: true, why, values },
      ...(pack ? {} : { pack: signed ? "valid/signed.eigen" : "valid/every-kind.eigen" }),
      ...(root ? { integrity: integrity(bytes) } : {}),
      ...(signed ? { keys: KEYS } : {}),
    });
  }
  const refuse = (list, ending, pack) => {
    for (const [name, [section, why, make, { step = stepOf(name, section), ...given } = {}]] of Object.entries(list)) {
      const file = `invalid/${name}.${ending}`;
      const bytes = make();
      files.set(file, bytes);
      const trust = given.integrity === "own" ? { ...given, integrity: integrity(bytes) } : given;
      index.push({ file, valid: false, section, step, why, ...pack, ...trust });
    }
  };
  refuse(PACKS, "eigen", {});
  refuse(TASK_FILES, "eigentask", { pack: "valid/signed.eigen" });
  const lines = index.map((entry) => `  ${JSON.stringify(entry)}`);
  files.set("index.json", new TextEncoder().encode(`[\n${lines.join(",\n")}\n]\n`));
  return new Map([...files, ...applyVectors()]);
}

if (process.argv[1] === new URL(import.meta.url).pathname) {
  for (const folder of ["valid", "invalid", "apply"]) {
    await rm(new URL(folder, import.meta.url), { recursive: true, force: true });
    await mkdir(new URL(folder, import.meta.url));
  }
  for (const [path, bytes] of vectors()) await writeFile(new URL(path, import.meta.url), bytes);
}
