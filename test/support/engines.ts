/**
 * Engines other than browsers and this Node: where each is, and how it runs test/support/engine-case.js.
 * EIGENLORA_RUNTIMES names a folder whose `node_modules` may have deno, bun, node@22, hermes-engine-cli,
 * hermes-compiler, metro with React Native's preset, and workerd; the shells are Debian's.
 */
import { execFile, spawn } from "node:child_process";
import { cp, mkdir, writeFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import { promisify } from "node:util";
import { build } from "esbuild";
import type { Test } from "tap";
import { bundleForHermes } from "../../benchmarks/lib/metro.js";
import { folderFor, fromRoot } from "./folder.ts";
import { packages, without } from "./required.ts";

const execute = promisify(execFile);
const root = fromRoot("");

/** Programs by the name of EIGENLORA_REQUIRE. */
export const PROGRAMS = {
  node22: packages(".bin/node"),
  deno: packages(".bin/deno"),
  bun: packages(".bin/bun"),
  hermes: packages("hermes-engine-cli/linux64-bin/hermes"),
  hermesc: packages("hermes-compiler/hermesc/linux64-bin/hermesc"),
  metro: packages("@react-native/metro-babel-transformer/package.json"),
  workerd: packages(".bin/workerd"),
  quickjs: "/usr/bin/qjs",
  jsc: "/usr/bin/jsc",
  gjs: "/usr/bin/gjs",
} as const;
export type Program = keyof typeof PROGRAMS;

/** Reason to skip a test that needs these; false where they are here, or must be. */
export const noProgram = (...programs: Program[]): string | false =>
  programs.map((name) => without(name, PROGRAMS[name])).find((reason) => reason) ?? false;

/** Installs the package in a project. @returns its folder */
export async function projectWith(t: Test): Promise<string> {
  const project = folderFor(t);
  await mkdir(join(project, "node_modules/eigenlora"), { recursive: true });
  for (const part of ["dist", "package.json"])
    await cp(join(root, part), join(project, "node_modules/eigenlora", part), { recursive: true });
  await cp(join(root, "test/support/engine-case.js"), join(project, "engine-case.js"));
  await writeFile(join(project, "package.json"), '{ "name": "app", "version": "1.0.0", "type": "module" }');
  return project;
}

/** Bundles code as one script, for engines without modules. */
export async function scriptOf(project: string, code: string): Promise<string> {
  const { outputFiles } = await build({
    stdin: { contents: code, resolveDir: project },
    bundle: true,
    format: "iife",
    platform: "browser",
    target: "es2022",
    write: false,
    logLevel: "silent",
  });
  return outputFiles[0]!.text;
}

/**
 * Output of a program, in the folder of the file that is its last argument.
 * @throws Error with its output when it fails, or prints nothing for a minute
 */
export async function outputOf(program: Program, ...args: string[]): Promise<string> {
  try {
    const how = { maxBuffer: 2 ** 26, timeout: 60_000, cwd: dirname(args.at(-1)!) };
    const { stdout } = await execute(PROGRAMS[program], args, how);
    return stdout;
  } catch (error) {
    const { message, stdout = "" } = error as Error & { stdout?: string };
    throw new Error(`${program}: ${message.slice(0, 2000)}\n${stdout.slice(0, 2000)}`);
  }
}

/** Bundles a file of the project with React Native's packager. */
export const metro = (
  project: string,
  entry: string,
  options?: { exports?: boolean; minify?: boolean },
): Promise<string> => bundleForHermes(packages(), project, entry, options);

/**
 * Bundles a worker as worker.bundle.js of a folder. Compiled modules and data stay modules of their own, as with
 * Wrangler.
 */
export async function bundleWorker(project: string, entry: string, folder: string = project): Promise<void> {
  await build({
    entryPoints: [join(project, entry)],
    outfile: join(folder, "worker.bundle.js"),
    bundle: true,
    format: "esm",
    target: "es2022",
    logLevel: "silent",
    plugins: [
      {
        name: "modules",
        setup: (b) =>
          b.onResolve({ filter: /\.(wasm|bin|eigen)$/ }, ({ path }) => ({
            path: `./${path.split("/").at(-1)}`,
            external: true,
          })),
      },
    ],
  });
}

/**
 * Log of a worker's test handler.
 * @param modules of the worker, the first one its main module, by path in the folder
 */
export async function workerd(folder: string, modules: readonly string[]): Promise<string> {
  const kinds: Record<string, string> = { wasm: "wasm", bin: "data", eigen: "data", js: "esModule" };
  const list = modules.map((path) => `(name = "${path}", ${kinds[path.split(".").at(-1)!]} = embed "${path}")`);
  await writeFile(
    join(folder, "config.capnp"),
    `using Workerd = import "/workerd/workerd.capnp";
const config :Workerd.Config = (services = [(name = "main", worker = .main)]);
const main :Workerd.Worker = (compatibilityDate = "2026-11-01", modules = [${list.join(", ")}]);
`,
  );
  const child = spawn(PROGRAMS.workerd, ["test", join(folder, "config.capnp")], { timeout: 60_000 });
  const chunks: Buffer[] = [];
  for (const stream of [child.stdout, child.stderr]) stream.on("data", (chunk: Buffer) => chunks.push(chunk));
  const code = await new Promise<number | null>((resolve, reject) => child.on("close", resolve).on("error", reject));
  const text = Buffer.concat(chunks).toString();
  if (code !== 0) throw new Error(`workerd: exit ${code}\n${text.slice(-4000)}`);
  return text;
}
