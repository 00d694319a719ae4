/**
 * Joins an encoder and a decoder from two files into one model in memory, for training: what a task learns in the encoder shows only in
 * the decoder's results, and gradients do not pass between files. For answering, the two files stay separate.
 */
import { checkOptions } from "../arguments.ts";
import { FormatError, SourceError } from "../errors.ts";
import { openSource } from "../open-source.ts";
import type { ReadOptions } from "../source.ts";
import { attribute, indexGraph, nestedGraphs, type OnnxModel } from "./model.ts";
import { isParameterName, SCOPES, writtenPath } from "./modules.ts";
import { dropUnused, makeNode } from "./nodes.ts";
import type { GraphProto, ModelProto, NodeProto, ValueInfoProto } from "./onnx_pb.ts";
import { type ModelFile, type ModelParts, readModel } from "./read.ts";
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

// Renames the values and nodes of a graph so that two graphs can be joined. Names keep the module that a layer belongs to, and also tell
// its side of the model.

/** The halves of a model, as module names tell them: "encoder.block.0", "model.decoder.layers.0". */
type Half = "encoder" | "decoder";

/** Renames values, also in nested graphs. */
export function renameValues(graph: GraphProto, name: (value: string) => string): void {
  for (const one of [...graph.initializer, ...graph.input, ...graph.output, ...graph.valueInfo])
    one.name = name(one.name);
  for (const node of graph.node) {
    node.input = node.input.map((value) => value && name(value));
    node.output = node.output.map((value) => value && name(value));
    for (const nested of nestedGraphs(node)) renameValues(nested, name);
  }
}

/** Renames nodes whose names are taken, within the same module: runtimes want names to differ. */
export function renameNodes(nodes: readonly NodeProto[], others: readonly NodeProto[], ending: string): void {
  const taken = new Set(others.map(({ name }) => name).filter((name) => name !== ""));
  for (const node of nodes) {
    while (taken.has(node.name)) node.name += ending;
    if (node.name !== "") taken.add(node.name);
  }
}

function* nodesOf(graph: GraphProto): Generator<NodeProto> {
  for (const node of graph.node) {
    yield node;
    for (const nested of nestedGraphs(node)) yield* nodesOf(nested);
  }
}

/** Names of modules and parameters, as the exporter wrote them. */
function* pathsOf(graph: GraphProto): Generator<string> {
  for (const { name } of graph.initializer) if (isParameterName(name)) yield name;
  for (const node of nodesOf(graph)) {
    const module = writtenPath(node);
    if (module) yield module;
  }
}

/** Segments of a path behind the one that names its half; all of them where none does. */
function inside(path: string, half: Half): string[] {
  const segments = path.split(".");
  return segments.slice(segments.indexOf(half) + 1);
}

/** Facts that both halves need to know of each other's names. */
interface Halves {
  /** Segments in front of the half's own: "model" in "model.decoder.layers.0". */
  readonly lead: string;
  /** First segments of names in the encoder: names of the decoder that begin so would be taken for the encoder's. */
  readonly common: ReadonlySet<string>;
}

function halvesOf(encoder: GraphProto, decoder: GraphProto): Halves {
  const [own, other] = [[...pathsOf(encoder)], [...pathsOf(decoder)]];
  const leadOf = (paths: readonly string[], half: Half): string | undefined => {
    const segments = paths.map((path) => path.split(".")).find((path) => path.includes(half));
    return segments?.slice(0, segments.indexOf(half)).join(".");
  };
  return {
    lead: leadOf(other, "decoder") ?? leadOf(own, "encoder") ?? "",
    common: new Set(own.map((path) => inside(path, "encoder")[0]!)),
  };
}

/**
 * Renames one half, in place. Its modules and parameters get the half's name in front where they lack it. In a decoder only names that
 * also occur in the encoder change, so that "lm_head" stays. Other values change where their name is taken.
 * @param fixed values that get a name of their own, or keep theirs
 * @param taken names already given; those of this half are added
 */
function nameHalf(
  graph: GraphProto,
  half: Half,
  { lead, common }: Halves,
  fixed: ReadonlyMap<string, string>,
  taken: Set<string>,
): void {
  const before = lead === "" ? "" : `${lead}.`;
  /** Segments to put in front of a path. */
  const front = (path: string): string => {
    const segments = path.split(".");
    // Nodes may lack modules that initializers name: an exporter sees only the modules that ran.
    if (segments[0] === half) return before;
    const stays = segments.includes(half) || (half === "decoder" && !common.has(segments[0]!));
    return stays ? "" : `${before}${half}${path === "" ? "" : "."}`;
  };
  const names = new Map(fixed);
  for (const value of fixed.values()) taken.add(value);
  renameValues(graph, (value) => {
    let name = names.get(value);
    if (name !== undefined) return name;
    name = isParameterName(value) ? front(value) + value : value;
    while (taken.has(name)) name = `${half}/${name}`;
    taken.add(name);
    names.set(value, name);
    return name;
  });
  for (const node of nodesOf(graph)) {
    const module = writtenPath(node);
    if (module === undefined || front(module) === "") continue;
    const scopes = node.metadataProps.find(({ key }) => key === SCOPES);
    if (scopes) scopes.value = `['${front(module)}${module}', '']`;
    else node.name = `/${front(module).replace(/\.$/, "").replaceAll(".", "/")}${node.name}`;
  }
}

// Takes one branch of a decoder that has two, as Optimum merges them: the branch that reads no cache and computes all tokens at once, as
// training needs.

/** The input that chooses the branch. */
const CHOICE = "use_cache_branch";

/** Operators that pass a condition on unchanged. */
const SAME = new Set(["Cast", "Identity", "Reshape", "Squeeze"]);

/**
 * Replaces each `If` on that input by the nodes of its branch without a cache, in place.
 * @param file for messages
 * @throws FormatError when a branch and its `If` differ in outputs
 */
function takeFirstRun(graph: GraphProto, file: string): void {
  for (let at = graph.node.findIndex((node) => isChoice(graph, node)); at >= 0; ) {
    const node = graph.node[at]!;
    const branch = attribute(node, "else_branch")?.g;
    if (!branch || branch.output.length !== node.output.length) {
      const message = `expected a branch with ${node.output.length} outputs for use_cache_branch = false, found ${branch?.output.length ?? "none"}: damaged, export the model again`;
      throw new FormatError(message, { file, part: `node ${node.name}` });
    }
    graph.node.splice(at, 1, ...unfolded(graph, node, branch));
    graph.initializer.push(...branch.initializer);
    graph.valueInfo.push(...branch.valueInfo);
    at = graph.node.findIndex((one) => isChoice(graph, one));
  }
}

function isChoice(graph: GraphProto, { opType, input }: NodeProto): boolean {
  if (opType !== "If") return false;
  let value = input[0];
  for (let i = 0; value !== CHOICE && i < SAME.size; i++) {
    const origin = graph.node.find(({ output }) => output.includes(value!));
    if (!origin || !SAME.has(origin.opType)) return false;
    value = origin.input[0];
  }
  return value === CHOICE;
}

/** Nodes of a branch, renamed so that no name of the surrounding graph is taken twice, with the results of the `If`. */
function unfolded(graph: GraphProto, node: NodeProto, branch: GraphProto): NodeProto[] {
  const around = [...graph.initializer, ...graph.input].map(({ name }) => name);
  const taken = new Set([...around, ...graph.node.flatMap(({ output }) => output)]);
  const own = new Set([...branch.initializer.map(({ name }) => name), ...branch.node.flatMap(({ output }) => output)]);
  const names = new Map<string, string>();
  const handed: NodeProto[] = [];
  for (const [i, result] of node.output.entries()) {
    if (result === "") continue;
    const { name } = branch.output[i]!;
    if (own.has(name) && !names.has(name)) names.set(name, result);
    else handed.push(makeNode("Identity", result, [name], result));
  }
  renameValues(branch, (value) => {
    let name = names.get(value) ?? value;
    if (names.has(value) || !own.has(value)) return name;
    while (taken.has(name)) name = `first/${name}`;
    taken.add(name);
    names.set(value, name);
    return name;
  });
  for (const one of handed) one.input = one.input.map((value) => names.get(value) ?? value);
  renameNodes(branch.node, graph.node, "_first");
  return [...branch.node, ...handed];
}
