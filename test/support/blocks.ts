/** Code blocks of README, docs and the READMEs of examples, with the markers that say why one is not run. */
import { readdirSync, readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";

const root = new URL("../../", import.meta.url);

export interface Block {
  /** Page from the root, and the line of the first line of code. */
  readonly page: string;
  readonly place: string;
  readonly language: string;
  readonly code: string;
  /**
   * Reason why the block is not run: `<!-- not run: reason -->` in front of it, or at the top of its page for all of
   * them.
   */
  readonly marker: string | undefined;
}

const MARKER = /^<!-- not run: ([^\n]+?) -->\n/;

/** Markdown files of a folder and below, by path from the root. */
export function pagesIn(folder: string): string[] {
  return readdirSync(new URL(folder, root), { recursive: true, encoding: "utf8" })
    .filter((file) => file.endsWith(".md") && !/\bnode_modules\b/.test(file))
    .map((file) => `${folder}/${file}`)
    .sort();
}

/** All pages whose blocks are run. The API reference is generated. */
export const PAGES: readonly string[] = [
  "README.md",
  ...pagesIn("docs").filter((page) => !page.startsWith("docs/api/")),
  ...pagesIn("examples"),
];

/** Blocks of a Markdown text. Those without a language hold output and drawings. */
export function blocksIn(page: string, text: string): Block[] {
  const whole = MARKER.exec(text)?.[1];
  return [...text.matchAll(/^(<!-- not run: .+? -->\n+)?( *)```(\w+)\n([\s\S]*?)^ *```$/gm)].map((found) => {
    const [, marker, indent, language, code] = found as unknown as string[];
    const line = text.slice(0, text.indexOf("```", found.index)).split("\n").length + 1;
    return {
      page,
      place: `${page}:${line}`,
      language: language!,
      code: code!.replaceAll(new RegExp(`^${indent}`, "gm"), ""),
      marker: marker ? MARKER.exec(marker)![1] : whole,
    };
  });
}

export const BLOCKS: readonly Block[] = PAGES.flatMap((page) =>
  blocksIn(page, readFileSync(fileURLToPath(new URL(page, root)), "utf8")),
);
