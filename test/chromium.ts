/**
 * Runs a module in headless Chromium, with WebGPU on a software adapter and onnxruntime-web's binaries under /ort/.
 */
import { build } from "esbuild";
import { spawn } from "node:child_process";
import { mkdtemp, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { serve } from "./range-server.ts";
import { chromium, required } from "./required.ts";

const root = fileURLToPath(new URL("..", import.meta.url));

/** For the options of a test. */
export const skip: string | false = !chromium && !required.has("chromium") && "chromium is not here";

/**
 * @param code of a module in test/, which posts its result to /result
 * @param files beside the page
 * @param t of whose end browser and server go
 * @returns what was posted
 */
export async function inChromium(code: string, files: Map<string, Uint8Array>, t: { teardown(end: () => unknown): void }): Promise<string> {
  if (!chromium) throw new Error("chromium is required but not installed");
  const bundled = await build({
    stdin: { contents: code, resolveDir: join(root, "test") },
    bundle: true,
    format: "esm",
    platform: "browser",
    write: false,
    logLevel: "silent",
  });
  files.set("page.js", bundled.outputFiles[0]!.contents);
  files.set("page.html", new TextEncoder().encode('<!doctype html><body><script type="module" src="/page.js"></script>'));
  for (const build of ["asyncify", "jsep"]) {
    for (const end of ["mjs", "wasm"]) {
      const file = `ort-wasm-simd-threaded.${build}.${end}`;
      files.set(`ort/${file}`, await readFile(join(root, "node_modules/onnxruntime-web/dist", file)));
    }
  }
  const server = await serve(files);
  t.teardown(() => server.close());
  const profile = await mkdtemp(join(tmpdir(), "eigenlora-chromium-"));
  t.teardown(() => rm(profile, { recursive: true, maxRetries: 5, retryDelay: 200 }));
  const flags = ["--headless=new", "--no-sandbox", "--enable-unsafe-webgpu", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"];
  const browser = spawn(chromium, [...flags, `--user-data-dir=${profile}`, server.url("page.html")]);
  const exited = new Promise<string>((_, reject) => browser.once("exit", (code) => reject(new Error(`chromium exited: ${code}`))));
  exited.catch(() => undefined);
  const text = await Promise.race([server.posted(), exited]);
  browser.kill();
  return text;
}
