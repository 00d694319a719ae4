/**
 * The layers of a model that are to be trained, by the names that adapters give them. Finding only.
 */
import { BaseMismatchError } from "../errors.ts";
import { NameMatcher } from "../names.ts";
import type { GraftHead } from "../onnx/graft.ts";
import { biasAdd, linearsOf, matrixShape, NotLinear, type Linear } from "../onnx/linear.ts";
import type { OnnxModel } from "../onnx/model.ts";
import { findParameters, type OnnxParameter } from "../onnx/modules.ts";
import { findWeight } from "../runtime/locate.ts";

/** A linear layer, wherever the model applies it. */
export interface Layer {
  readonly name: string;
  readonly in: number;
  readonly out: number;
  readonly linears: readonly Linear[];
}

export class Layers {
  readonly #model: OnnxModel;
  readonly #parameters: ReadonlyMap<string, OnnxParameter>;
  readonly #names: NameMatcher;

  /** @param model as it was read, before anything was added */
  constructor(model: OnnxModel) {
    this.#model = model;
    this.#parameters = new Map(findParameters(model).map((parameter) => [parameter.name, parameter]));
    this.#names = new NameMatcher(this.#parameters.keys());
  }

  /**
   * @param module as in an adapter: "bert.encoder.layer.0.attention.self.query"
   * @param byHand names of weights by module name, before anything else
   * @throws BaseMismatchError when the weight is missing or ambiguous, or no linear layer's
   */
  find(module: string, byHand?: ReadonlyMap<string, string>): Layer {
    const parameter = this.#parameters.get(findWeight(this.#names, module, byHand))!;
    const shape = matrixShape(parameter);
    const linears = shape ? linearsOf(this.#model, parameter) : new NotLinear(`its shape is [${parameter.shape.join(", ")}]`);
    if (!shape || linears instanceof NotLinear) {
      const message = `"${module}" cannot be trained, "${parameter.name}" is not the weight of linear layers alone: ${(linears as NotLinear).reason}`;
      throw new BaseMismatchError(message, { module });
    }
    return { name: module, in: shape[1], out: shape[0], linears };
  }

  /**
   * A layer as a head, which is trained whole and with a bias, whether the model has one or not: exporters drop zeros.
   * @throws BaseMismatchError as `find`
   */
  findHead(module: string, byHand?: ReadonlyMap<string, string>): GraftHead {
    const { linears, ...layer } = this.find(module, byHand);
    return { ...layer, bias: true, places: linears.map((linear) => ({ linear, end: biasAdd(this.#model, linear) ?? linear.node })) };
  }
}
