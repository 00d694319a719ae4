/**
 * Operators that work on each element by itself, and those that broadcast two or more inputs.
 */
import type { Emitter } from "../emit.ts";
import { broadcast, type NodeGradient, type Rule } from "../node-gradient.ts";

/** Rule of one input: `derive` gives g · dy/dx. */
function unary(derive: (emit: Emitter, g: string, x: string, y: string, node: NodeGradient) => string): Rule {
  return broadcast({ 0: (node) => derive(node.emit, node.g, node.x(), node.y, node) });
}

const pass = unary((_, g) => g);

const add: Rule = {
  backward(node) {
    for (const input of node.proto.input.keys()) node.giveSummed(input, () => node.g);
  },
};

const pow: Rule = {
  backward(node) {
    const { emit, g, y } = node;
    if (node.wants(1)) return node.refuse("has a trained exponent, which gradients do not flow to");
    const [x, exponent] = [node.x(0), node.x(1)];
    const known = node.constant(exponent);
    const [e] = known?.length === 1 ? known : [];
    node.giveSummed(0, () => {
      if (e === 2) return emit.mul(g, emit.mul(x, 2));
      if (e === 3) return emit.mul(g, emit.mul(emit.mul(x, x), 3));
      if (e === 0.5) return emit.div(emit.mul(g, 0.5), y);
      if (e !== undefined) return emit.mul(g, emit.mul(emit.op("Pow", [x, e - 1]), e));
      return emit.mul(g, emit.mul(exponent, emit.op("Pow", [x, emit.sub(exponent, 1)])));
    });
  },
};

/** 2/√π · exp(−x²), the derivative of erf, in the fewest passes over the elements. */
const erfSlope = (emit: Emitter, x: string): string =>
  emit.op("Exp", [emit.sub(Math.log(2 / Math.sqrt(Math.PI)), emit.mul(x, x))]);

const SQRT_2_BY_PI = Math.sqrt(2 / Math.PI);
/** Coefficient in the approximation of GELU by a hyperbolic tangent. */
const CUBIC = 0.044715;

/** x · Φ(x), or its approximation. */
const gelu = unary((emit, g, x, _, node) => {
  if (node.proto.opType !== "FastGelu" && node.text("approximate") !== "tanh") {
    const u = emit.mul(x, Math.SQRT1_2);
    return emit.mul(emit.mul(g, 0.5), emit.add(emit.add(emit.op("Erf", [u]), emit.mul(u, erfSlope(emit, u))), 1));
  }
  const square = emit.mul(x, x);
  const t = emit.op("Tanh", [emit.mul(emit.mul(x, emit.add(emit.mul(square, CUBIC), 1)), SQRT_2_BY_PI)]);
  const inner = emit.mul(emit.add(emit.mul(square, 3 * CUBIC), 1), SQRT_2_BY_PI);
  const slope = emit.mul(emit.mul(x, emit.sub(1, emit.mul(t, t))), inner);
  return emit.mul(g, emit.mul(emit.add(emit.add(t, 1), slope), 0.5));
});

/** Rules by operator. Where no gradient passes it is exactly 0, never 0 · NaN. */
export const ELEMENTWISE: readonly (readonly [string, Rule])[] = [
  ["Identity", pass],
  ["Cast", pass],
  ["Dropout", pass],
  ["Add", add],
  ["Sum", add],
  ["Sub", broadcast({ 0: ({ g }) => g, 1: ({ emit, g }) => emit.neg(g) })],
  ["Mul", broadcast({ 0: (node) => node.emit.mul(node.g, node.x(1)), 1: (node) => node.emit.mul(node.g, node.x(0)) })],
  [
    "Div",
    broadcast({
      0(node) {
        // Multiplication is faster.
        const known = node.constant(node.x(1));
        return known?.length === 1 ? node.emit.mul(node.g, 1 / known[0]!) : node.emit.div(node.g, node.x(1));
      },
      1: (node) => node.emit.neg(node.emit.div(node.emit.mul(node.g, node.y), node.x(1))),
    }),
  ],
  ["Pow", pow],
  [
    "Where",
    broadcast({
      1: (node) => node.emit.op("Where", [node.x(0), node.g, 0]),
      2: (node) => node.emit.op("Where", [node.x(0), 0, node.g]),
    }),
  ],
  ["Gelu", gelu],
  ["com.microsoft.Gelu", gelu],
  ["com.microsoft.FastGelu", gelu],
  ["Neg", unary((emit, g) => emit.neg(g))],
  ["Reciprocal", unary((emit, g, _, y) => emit.neg(emit.mul(g, emit.mul(y, y))))],
  ["Sqrt", unary((emit, g, _, y) => emit.div(emit.mul(g, 0.5), y))],
  ["Exp", unary((emit, g, _, y) => emit.mul(g, y))],
  ["Log", unary((emit, g, x) => emit.div(g, x))],
  ["Erf", unary((emit, g, x) => emit.mul(g, erfSlope(emit, x)))],
  ["Tanh", unary((emit, g, _, y) => emit.mul(g, emit.sub(1, emit.mul(y, y))))],
  ["Sigmoid", unary((emit, g, _, y) => emit.mul(g, emit.mul(y, emit.sub(1, y))))],
  ["Softplus", unary((emit, g, x) => emit.mul(g, emit.op("Sigmoid", [x])))],
  ["Relu", unary((emit, g, _, y) => emit.op("Where", [emit.op("Less", [0, y]), g, 0]))],
  // The gradient passes where nothing was clipped.
  ["Clip", unary((emit, g, x, y) => emit.op("Where", [emit.op("Equal", [x, y]), g, 0]))],
];
