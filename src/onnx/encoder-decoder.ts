/**
 * Joins an encoder and a decoder from two files into one model in memory, for training: what a task learns in the encoder shows only in
 * the decoder's results, and gradients do not pass between files. For answering, the two files stay separate.
 */
import { checkOptions } from "../arguments.ts";
import { FormatError, SourceError } from "../errors.ts";
import { openSource } from "../open-source.ts";
import type { ReadOptions } from "../source.ts";
import { takeFirstRun } from "./branch.ts";
import { isParameterName } from "./claims.ts";
import { indexGraph, type OnnxModel } from "./model.ts";
import { dropUnused } from "./nodes.ts";
import type { GraphProto, ModelProto, ValueInfoProto } from "./onnx_pb.ts";
import { type ModelFile, type ModelParts, readModel } from "./read.ts";
import { halvesOf, nameHalf, renameNodes } from "./rename.ts";
import { EXTERNAL, type OpenExternal, readTensor, tensorType } from "./tensors.ts";
import { LEAST_DETACHED, point } from "./write.ts";

/** Name of the value that the encoder hands to the decoder. */
const SAID = "encoder_last_hidden_state";
const READ = "encoder_hidden_states";
const MASK = "encoder_attention_mask";

/** Location of the encoder's file among the decoder's files; prefix of the encoder's other files. */
const BESIDE = "eigenlora-encoder";

/** Field number of `ModelProto.functions`. */
const FUNCTIONS = 25;

/** Names of `TensorProto.DataType`, for outputs of encoders and masks. */
const TYPES: Readonly<Record<number, string>> = { 1: "f32", 6: "int32", 7: "int64", 9: "bool", 10: "f16", 16: "bf16" };

const PAIR = 'pass { encoder: "encoder_model.onnx", decoder: "decoder_model_merged.onnx" } of one model and one export';

/**
 * Reads and joins the two halves.
 * @param options `external` is asked for files beside either one
 * @throws FormatError when a file is not the half that it is given as, or the two do not fit each other
 */
export async function readParts(parts: ModelParts, options: Parameters<typeof readModel>[1]): Promise<ModelFile> {
  checkOptions("model", parts, ["encoder", "decoder"]);
  const encoder = await readModel(parts.encoder, options);
  let decoder: ModelFile | undefined;
  const close = async (): Promise<void> => {
    await encoder.close();
    await decoder?.close();
  };
  try {
    decoder = await readModel(parts.decoder, options);
    return { ...(await joined(encoder, decoder, options)), close };
  } catch (error) {
    await close();
    throw error;
  }
}

async function joined(
  encoder: ModelFile,
  decoder: ModelFile,
  options?: ReadOptions,
): Promise<Omit<ModelFile, "close">> {
  const [first, second] = [encoder.model.graph.proto, decoder.model.graph.proto];
  const said = checkHalves(encoder.model, decoder.model);
  const proto = joinedHeader(encoder.model, decoder.model);
  takeFirstRun(second, decoder.model.name);
  second.output = second.output.filter(({ name }) => !/^present/.test(name));
  first.output = first.output.filter(({ name }) => name === said.name);
  for (const half of [second, first]) dropUnused(half, () => false);
  dropGiven(first);
  dropGiven(second);
  checkCaches(decoder.model);
  const tables = await sharedTables(encoder, decoder, options);
  const inputs = decoderInputs(first.input, second.input);
  checkFits(encoder.model, decoder.model, said);
  const keeps = [...first.input.map((one) => one.name), ...tables];
  const taken = new Set([...keeps, SAID]);
  const halves = halvesOf(first, second);
  const same = new Map([...tables].map((name) => [name, name]));
  nameHalf(second, "decoder", halves, new Map([...same, ...inputs]), taken);
  const stays = keeps.map((name) => [name, name] as const);
  nameHalf(first, "encoder", halves, new Map([...stays, [said.name, SAID]]), taken);
  renameNodes(first.node, second.node, "_encoder");
  const apart = encoder.folder === undefined || encoder.folder !== decoder.folder;
  if (apart) pointBeside(encoder);
  nameDimensions(first.input, second.input);
  const given = new Set([SAID, ...first.input.map(({ name }) => name)]);
  second.input = [...first.input, ...second.input.filter(({ name }) => !given.has(name))];
  second.initializer.unshift(...first.initializer.filter(({ name }) => !tables.has(name)));
  second.node.unshift(...first.node);
  second.valueInfo.unshift(...first.valueInfo);
  const name = `${encoder.model.name} + ${decoder.model.name}`;
  const model = { ...decoder.model, name, proto, graph: indexGraph(second, name) };
  const { bytes, folder } = decoder;
  return {
    model,
    bytes,
    ...(apart ? { folder: undefined, external: besideBoth(encoder, decoder) } : { folder, external: decoder.external }),
  };
}

const namesOf = (values: readonly { readonly name: string }[]): string =>
  values.map(({ name }) => name).join(", ") || "none";

/** Drops inputs that only declare defaults of initializers, as old files do. */
function dropGiven(graph: GraphProto): void {
  const own = new Set(graph.initializer.map(({ name }) => name));
  graph.input = graph.input.filter(({ name }) => !own.has(name));
}

/**
 * Checks that each file is the half that it is given as.
 * @returns the encoder's output
 */
function checkHalves(encoder: OnnxModel, decoder: OnnxModel): ValueInfoProto {
  const reads = ({ graph }: OnnxModel): boolean => graph.proto.input.some(({ name }) => name === READ);
  const { input, output } = encoder.graph.proto;
  const said = output.find(({ name }) => name === "last_hidden_state") ?? (output.length === 1 ? output[0] : undefined);
  if (reads(encoder) || !said) {
    const swapped = reads(encoder) && !reads(decoder) ? ": the two are swapped" : "";
    refuse(
      encoder,
      "graph",
      `an encoder, with the output last_hidden_state and without the input ${READ}`,
      `inputs ${namesOf(input)} and outputs ${namesOf(output)}${swapped}`,
    );
  }
  if (!reads(decoder)) {
    const found = `inputs ${namesOf(decoder.graph.proto.input)}`;
    refuse(decoder, "graph", `a decoder, with the inputs input_ids and ${READ}`, found);
  }
  return said!;
}

function refuse({ name: file }: OnnxModel, part: string, expected: string, found: string, advice = PAIR): never {
  throw new FormatError(`expected ${expected}, found ${found}; ${advice}`, { file, part });
}

/** The decoder's header with what the encoder's nodes need. @throws FormatError when a version of operators differs */
function joinedHeader(encoder: OnnxModel, decoder: OnnxModel): ModelProto {
  const [first, proto] = [encoder.proto, decoder.proto];
  const domain = (name: string): string => (name === "ai.onnx" ? "" : name);
  for (const one of first.opsetImport) {
    const own = proto.opsetImport.find((other) => domain(other.domain) === domain(one.domain));
    if (!own) proto.opsetImport.push(one);
    else if (own.version !== one.version) {
      const of = domain(one.domain) || "the standard operators";
      refuse(
        decoder,
        "opset",
        `version ${one.version} of ${of}, as ${encoder.name} has`,
        `${own.version}`,
        "export both with the same opset_version",
      );
    }
  }
  const functions = ({ $unknown = [] }: ModelProto) => $unknown.filter(({ no }) => no === FUNCTIONS);
  const [added, known] = [functions(first), functions(proto)].map((all) => all.map(({ data }) => String(data)));
  if (known!.length === 0) proto.$unknown = [...(proto.$unknown ?? []), ...functions(first)];
  else if (added!.length > 0 && String(added) !== String(known))
    refuse(
      decoder,
      "functions",
      `those of ${encoder.name}`,
      "others",
      "export both in the same way, or inline their functions",
    );
  if (first.irVersion > proto.irVersion) proto.irVersion = first.irVersion;
  return proto;
}

/** @throws FormatError when the decoder continues an earlier run */
function checkCaches(decoder: OnnxModel): void {
  const { input, node } = decoder.graph.proto;
  const past = input.find(({ name }) => /^past|^use_cache_branch$/.test(name));
  if (!past) return;
  const choice = node.find(({ opType }) => opType === "If");
  const found = choice ? `${past.name}, and an If "${choice.name}" on "${choice.input[0]}"` : past.name;
  refuse(
    decoder,
    `input ${past.name}`,
    "a decoder that begins without caches, or has an If on use_cache_branch",
    found,
    "pass decoder_model_merged.onnx, or decoder_model.onnx, which has no caches",
  );
}

/** Names of a decoder's inputs in the joined model. */
function decoderInputs(first: readonly ValueInfoProto[], second: readonly ValueInfoProto[]): Map<string, string> {
  const taken = new Set(first.map(({ name }) => name));
  // Inputs about tokens belong to the decoder, even if the encoder has none of that name.
  const ofTokens = ["input_ids", "attention_mask", "position_ids", "token_type_ids"];
  const known = new Map(ofTokens.map((name) => [name, `decoder_${name}`]));
  known.set(MASK, "attention_mask").set(READ, SAID);
  return new Map(second.map(({ name }) => [name, known.get(name) ?? (taken.has(name) ? `decoder_${name}` : name)]));
}

function tensorIn({ type }: ValueInfoProto) {
  return type?.value.case === "tensorType" ? type.value.value : undefined;
}

/** @throws FormatError when the decoder reads something else than the encoder's output */
function checkFits(encoder: OnnxModel, decoder: OnnxModel, said: ValueInfoProto): void {
  const { input } = decoder.graph.proto;
  const read = input.find(({ name }) => name === READ);
  if (!read) refuse(decoder, "graph", `logits that come of ${READ}`, "none");
  const mask = encoder.graph.proto.input.find(({ name }) => name === "attention_mask");
  for (const [one, other] of [
    [said, read],
    [mask, input.find(({ name }) => name === MASK)],
  ]) {
    const [given, wanted] = [one, other].map((value) => value && tensorIn(value)?.elemType);
    if (given === undefined || wanted === undefined || given === wanted) continue;
    const [found = `type ${wanted}`, expected = `type ${given}`] = [TYPES[wanted], TYPES[given]];
    refuse(decoder, `input ${other!.name}`, `${expected}, as ${encoder.name} has`, found);
  }
  const [given, wanted] = [widthOf(said), widthOf(read) ?? widthRead(decoder.graph.proto)];
  if (given !== undefined && wanted !== undefined && given !== wanted)
    refuse(decoder, `input ${READ}`, `${given} numbers for each token, as ${encoder.name} gives`, `${wanted}`);
}

/** Last dimension of a value, where it is fixed. */
function widthOf(value: ValueInfoProto): number | undefined {
  const last = tensorIn(value)?.shape?.dim.at(-1)?.value;
  return last?.case === "dimValue" ? Number(last.value) : undefined;
}

/** Width of a layer that reads the encoder's output. */
function widthRead({ node, initializer }: GraphProto): number | undefined {
  const weight = node.find(({ opType, input }) => opType === "MatMul" && input[0] === READ)?.input[1];
  const rows = initializer.find(({ name }) => name === weight)?.dims[0];
  return rows === undefined ? undefined : Number(rows);
}

/**
 * Names the free dimensions of the decoder's inputs: the encoder's batch and a length of its own, whatever the two files call them.
 * @param second renamed already
 */
function nameDimensions(first: readonly ValueInfoProto[], second: readonly ValueInfoProto[]): void {
  const dims = (value: ValueInfoProto) => tensorIn(value)?.shape?.dim ?? [];
  const rows = first.map((one) => dims(one)[0]?.value).find((value) => value !== undefined);
  const known = new Set(first.flatMap(dims).map(({ value }) => (value.case === "dimParam" ? value.value : "")));
  for (const value of second) {
    for (const [axis, dim] of dims(value).entries()) {
      const own = dim.value.case === "dimParam" ? dim.value.value : "";
      if (dim.value.case === "dimValue") continue;
      if (axis === 0 && rows) dim.value = rows;
      else if (own === "" || known.has(own))
        dim.value = { case: "dimParam", value: `decoder_${own || "sequence_length"}` };
    }
  }
}

/**
 * Tables that both files hold under one name: embeddings shared by encoder and decoder. A task that changes one changes both.
 * @returns their names
 */
async function sharedTables(encoder: ModelFile, decoder: ModelFile, options?: ReadOptions): Promise<Set<string>> {
  const others = new Map(decoder.model.graph.proto.initializer.map((tensor) => [tensor.name, tensor]));
  const shared = new Set<string>();
  for (const tensor of encoder.model.graph.proto.initializer) {
    const { name } = tensor;
    const other = others.get(name);
    if (!other || !isParameterName(name) || /\.\d+\./.test(name) || tensor.dims.length !== 2) continue;
    const [one, two] = [tensorType(tensor, encoder.model.name), tensorType(other, decoder.model.name)];
    if (one.dtype === "other" || one.dtype !== two.dtype || String(one.shape) !== String(two.shape)) continue;
    const first = (await readTensor(tensor, encoder.model.name, encoder.external, options)).data;
    const second = (await readTensor(other, decoder.model.name, decoder.external, options)).data;
    if (first.every((byte, i) => byte === second[i])) shared.add(name);
  }
  return shared;
}

/** Points the encoder's weights to where `besideBoth` finds them. */
function pointBeside({ model, bytes }: ModelFile): void {
  for (const { initializer } of model.graph.scopes.keys()) {
    for (const tensor of initializer) {
      const { rawData, externalData, dataLocation } = tensor;
      const location = externalData.find(({ key }) => key === "location");
      if (dataLocation === EXTERNAL && location) location.value = `${BESIDE}-${location.value}`;
      else if (rawData.length >= LEAST_DETACHED && rawData.buffer === bytes.buffer)
        point(tensor, BESIDE, rawData.byteOffset - bytes.byteOffset, rawData.length);
    }
  }
}

/** Opens files beside either half, and the encoder's own. */
function besideBoth(encoder: ModelFile, decoder: ModelFile): OpenExternal {
  return async (location) => {
    if (location === BESIDE) return openSource(encoder.bytes);
    const own = location.startsWith(`${BESIDE}-`);
    const { external, model } = own ? encoder : decoder;
    const name = own ? location.slice(BESIDE.length + 1) : location;
    if (external) return external(name);
    const message = `some weights lie in the file "${name}"; give that with the option \`external\``;
    throw new SourceError(message, { file: model.name });
  };
}
