/**
 * The paper's two settings by shape: how large is the pack, how long does packing take, and how much memory? Synthetic
 * adapters with the same shapes, ranks and number are made while they are read, in a process of their own for each
 * number format.
 */
import { choice, readArguments } from "./lib/arguments.js";
import { print } from "./lib/report.js";
import { SETTINGS } from "./lib/settings.js";
import { DTYPES, shapesPart } from "./lib/shapes.js";

const names = /** @type {import("./lib/settings.js").SettingName[]} */ (Object.keys(SETTINGS));
const { json, setting, type } = readArguments("The paper's two settings by shape: how large is the pack?", {
  setting: choice(names, "this one alone"),
  type: choice(DTYPES, "this number format alone"),
});

const parts = names
  .filter((name) => setting === undefined || name === setting)
  .map((name) => shapesPart(name, type ? [type] : DTYPES));
print(json, parts);
