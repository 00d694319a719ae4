/**
 * All operators that gradients pass, and those at which they end.
 */
import type { Rule } from "../node-gradient.ts";
import { ELEMENTWISE } from "./elementwise.ts";
import { PRODUCTS } from "./matmul.ts";
import { NORMALIZATIONS } from "./normalization.ts";
import { QUANTIZED } from "./quantized.ts";
import { REDUCTIONS } from "./reduce.ts";
import { MOVES } from "./shape.ts";

/** Rules by operator, with the domain in front where it is not the standard one. */
export const RULES: ReadonlyMap<string, Rule> = new Map([
  ...ELEMENTWISE,
  ...PRODUCTS,
  ...NORMALIZATIONS,
  ...REDUCTIONS,
  ...MOVES,
  ...QUANTIZED,
]);

/** Operators whose results do not change with small changes of their inputs. */
export const STOPS: ReadonlySet<string> = new Set([
  ...["Shape", "Size", "Range", "ConstantOfShape", "NonZero", "ArgMax", "ArgMin"],
  ...["Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Not", "Xor", "IsNaN", "IsInf"],
  ...["Floor", "Ceil", "Round", "Sign"],
]);
