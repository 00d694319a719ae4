/**
 * Operators that work on each element by itself, and those that broadcast two or more inputs.
 */
import type { Emitter } from "../emit.ts";
import type { Rule, Step } from "../step.ts";

/** Of one input: `derive` gives g · dy/dx. */
function unary(derive: (emit: Emitter, g: string, x: string, y: string, step: Step) => string): Rule {
  return { inputs: [0], backward: (step) => step.give(0, derive(step.emit, step.g, step.x(), step.y, step)) };
}

/** g where a condition holds, 0 elsewhere: never 0 · NaN. */
function where(emit: Emitter, condition: string, g: string): string {
  return emit.op("Where", [condition, g, 0]);
}

const pass = unary((_, g) => g);

const add: Rule = {
  backward(step) {
    for (const input of step.node.input.keys()) step.giveSummed(input, () => step.g);
  },
};

const sub: Rule = {
  backward(step) {
    step.giveSummed(0, () => step.g);
    step.giveSummed(1, () => step.emit.neg(step.g));
  },
};

const mul: Rule = {
  backward(step) {
    step.giveSummed(0, () => step.emit.mul(step.g, step.x(1)));
    step.giveSummed(1, () => step.emit.mul(step.g, step.x(0)));
  },
};

const div: Rule = {
  backward(step) {
    const { emit, g, y } = step;
    // Multiplying is faster.
    const known = step.constant(step.x(1));
    step.giveSummed(0, () => (known?.length === 1 ? emit.mul(g, 1 / known[0]!) : emit.div(g, step.x(1))));
    step.giveSummed(1, () => emit.neg(emit.div(emit.mul(g, y), step.x(1))));
  },
};

const pow: Rule = {
  backward(step) {
    const { emit, g, y } = step;
    if (step.wants(1)) return step.refuse("has a trained exponent, which gradients do not flow to");
    const [x, exponent] = [step.x(0), step.x(1)];
    const known = step.constant(exponent);
    const [e] = known?.length === 1 ? known : [];
    step.giveSummed(0, () => {
      if (e === 2) return emit.mul(g, emit.mul(x, 2));
      if (e === 3) return emit.mul(g, emit.mul(emit.mul(x, x), 3));
      if (e === 0.5) return emit.div(emit.mul(g, 0.5), y);
      if (e !== undefined) return emit.mul(g, emit.mul(emit.op("Pow", [x, e - 1]), e));
      return emit.mul(g, emit.mul(exponent, emit.op("Pow", [x, emit.sub(exponent, 1)])));
    });
  },
};

const choose: Rule = {
  inputs: [1, 2],
  backward(step) {
    const { emit, g } = step;
    step.giveSummed(1, () => where(emit, step.x(0), g));
    step.giveSummed(2, () => emit.op("Where", [step.x(0), 0, g]));
  },
};

/** 2/√π · exp(−x²), the derivative of erf, in the fewest passes over the elements. */
const erfSlope = (emit: Emitter, x: string): string =>
  emit.op("Exp", [emit.sub(Math.log(2 / Math.sqrt(Math.PI)), emit.mul(x, x))]);

const SQRT_2_BY_PI = Math.sqrt(2 / Math.PI);
/** Of the approximation of GELU by a hyperbolic tangent. */
const CUBIC = 0.044715;

/** x · Φ(x), or its approximation. */
const gelu = unary((emit, g, x, _, step) => {
  if (step.text("approximate") !== "tanh") {
    const u = emit.mul(x, Math.SQRT1_2);
    return emit.mul(emit.mul(g, 0.5), emit.add(emit.add(emit.op("Erf", [u]), emit.mul(u, erfSlope(emit, u))), 1));
  }
  const square = emit.mul(x, x);
  const t = emit.op("Tanh", [emit.mul(emit.mul(x, emit.add(emit.mul(square, CUBIC), 1)), SQRT_2_BY_PI)]);
  const inner = emit.mul(emit.add(emit.mul(square, 3 * CUBIC), 1), SQRT_2_BY_PI);
  const slope = emit.mul(emit.mul(x, emit.sub(1, emit.mul(t, t))), inner);
  return emit.mul(g, emit.mul(emit.add(emit.add(t, 1), slope), 0.5));
});

export const ELEMENTWISE: readonly (readonly [string, Rule])[] = [
  ["Identity", pass],
  ["Cast", pass],
  ["Dropout", pass],
  ["Add", add],
  ["Sum", add],
  ["Sub", sub],
  ["Mul", mul],
  ["Div", div],
  ["Pow", pow],
  ["Where", choose],
  ["Gelu", gelu],
  ["Neg", unary((emit, g) => emit.neg(g))],
  ["Reciprocal", unary((emit, g, _, y) => emit.neg(emit.mul(g, emit.mul(y, y))))],
  ["Sqrt", unary((emit, g, _, y) => emit.div(emit.mul(g, 0.5), y))],
  ["Exp", unary((emit, g, _, y) => emit.mul(g, y))],
  ["Log", unary((emit, g, x) => emit.div(g, x))],
  ["Erf", unary((emit, g, x) => emit.mul(g, erfSlope(emit, x)))],
  ["Tanh", unary((emit, g, _, y) => emit.mul(g, emit.sub(1, emit.mul(y, y))))],
  ["Sigmoid", unary((emit, g, _, y) => emit.mul(g, emit.mul(y, emit.sub(1, y))))],
  ["Softplus", unary((emit, g, x) => emit.mul(g, emit.op("Sigmoid", [x])))],
  ["Relu", unary((emit, g, _, y) => where(emit, emit.op("Less", [0, y]), g))],
  // Where nothing was cut off.
  ["Clip", unary((emit, g, x, y) => where(emit, emit.op("Equal", [x, y]), g))],
];
