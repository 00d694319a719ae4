/**
 * Bundles a file with React Native's packager, as an app for Hermes has it: Metro, with React Native's configuration of
 * resolving and transforming. Tests of engines use it too.
 */
import { execFile } from "node:child_process";
import { cp, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { promisify } from "node:util";

/**
 * @param {string} tools a node_modules with metro, metro-config, @react-native/babel-preset and @babel/runtime
 * @param {string} project a folder with a package.json and its node_modules
 * @param {string} entry in it
 * @param {{ exports?: boolean, minify?: boolean }} [options] exports: whether package.json's `exports` are looked at
 * @returns {Promise<string>} path of the bundle
 */
export async function bundleForHermes(tools, project, entry, { exports = true, minify = false } = {}) {
  // Metro searches only its roots.
  for (const name of ["@babel/runtime", "metro-runtime"])
    await cp(join(tools, name), join(project, "node_modules", name), { recursive: true });
  const given = { tools: join(tools, "/"), project, entry, out: join(project, "app.bundle.js"), exports, minify };
  const script = join(project, "bundle.cjs");
  await writeFile(script, `(${main})(${JSON.stringify(given)}, require);`);
  await promisify(execFile)(process.execPath, [script], { maxBuffer: 2 ** 26 });
  return given.out;
}

/** Runs in a process of its own: Metro leaves workers and watchers behind. It is passed as text. */
const main = `async function (given, require) {
  const Metro = require(given.tools + "metro");
  const { FileStore } = require(given.tools + "metro-cache");
  const { getDefaultConfig, mergeConfig } = require(given.tools + "metro-config");
  try {
    const plain = await getDefaultConfig(given.project);
    const config = mergeConfig(plain, {
      projectRoot: given.project,
      watchFolders: [given.project, given.tools + "metro-runtime"],
      reporter: { update() {} },
      maxWorkers: 1,
      // The next bundle of the same project reuses the transformed files.
      cacheStores: [new FileStore({ root: given.project + "/cache" })],
      resolver: {
        resolverMainFields: ["react-native", "browser", "main"],
        platforms: ["android", "ios"],
        unstable_conditionNames: ["react-native"],
        unstable_enablePackageExports: given.exports,
        assetExts: [...plain.resolver.assetExts, "eigen", "onnx"],
      },
      transformer: {
        allowOptionalDependencies: true,
        assetRegistryPath: "@react-native/assets-registry/registry",
        babelTransformerPath: require.resolve(given.tools + "@react-native/metro-babel-transformer"),
        getTransformOptions: async () => ({ transform: { experimentalImportSupport: false, inlineRequires: true } }),
      },
    });
    const profile = { platform: "android", dev: false, unstable_transformProfile: "hermes-stable" };
    await Metro.runBuild(config, { entry: given.entry, out: given.out, minify: given.minify, ...profile });
    process.exit(0);
  } catch (error) {
    console.error(error);
    process.exit(1);
  }
}`;
