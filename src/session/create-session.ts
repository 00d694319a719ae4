/**
 * Makes a session: the model is read, planned, changed and loaded once.
 */
import { checkArgument, checkChoice, checkOptions, checkPack } from "../arguments.ts";
import type { Pack } from "../core/pack.ts";
import { BackendError } from "../errors.ts";
import { type ModelFile, readModel } from "../onnx/read.ts";
import { externalFiles } from "../onnx/tensors.ts";
import { detachWeights } from "../onnx/write.ts";
import { tellReady } from "../open-source.ts";
import type { SourceInput } from "../source.ts";
import { type Delivery, inputDelivery } from "./delivery.ts";
import type { Engine } from "./engine.ts";
import { SESSION_OPTIONS, type SessionOptions } from "./options.ts";
import { prepareModel } from "./prepare.ts";
import type { SessionParts } from "./probe.ts";
import { Session, type SessionTypes } from "./session.ts";

/**
 * Prepares a model for all tasks of a pack and loads it once.
 * @param engine runs the model
 * @param source bytes, path, URL or Blob of the ONNX file; files beside it are found by path or URL, or given by `external`
 * @throws BaseMismatchError when modules are missing, ambiguous, of another shape or of another model; or when the mode
 *   asked for cannot do what the tasks bring: the message names one that can
 * @throws FormatError when the model is truncated, no ONNX model or of an opset before 11
 * @throws BackendError when the engine refuses the model or has no room for it, or the probe finds that it computes something else
 */
export async function createSession<T extends SessionTypes>(
  engine: Engine,
  source: SourceInput,
  pack: Pack,
  options: SessionOptions = {},
): Promise<Session<T>> {
  checkArgument("createSession", engine, "an engine (createEngine(ort))", "load");
  checkPack("createSession", pack);
  checkOptions("createSession", options, SESSION_OPTIONS);
  const { trainable = false, mode = "auto" } = options;
  checkModes(options);
  if (trainable && mode !== "auto" && mode !== "factors") {
    throw new RangeError(`mode: tasks are learned in mode "factors", got ${JSON.stringify(mode)}`);
  }
  const file = await readModel(source, { ...options, weightsApart: engine.readsFiles });
  const session = await sessionOn<T>(engine, file, pack, options);
  await tellReady(file.model.name, options.onProgress);
  return session;
}

/** @throws RangeError for another mode or form of components than there are */
export function checkModes({ mode = "auto", components = "stored" }: SessionOptions): void {
  checkChoice("mode", mode, ["auto", "core", "factors", "folded"]);
  checkChoice("components", components, ["stored", "f32"]);
}

/**
 * Before weights in files of their own are read: they take minutes.
 * @throws BackendError when they are more than the engine has room for
 */
function refuseLarger({ model, bytes }: ModelFile, { room = Infinity, name, provider }: Engine): void {
  const apart = [...externalFiles(model.graph.proto).values()].reduce((sum, end) => sum + end, 0);
  const size = (bytes: number): string => `${(bytes / 1e9).toFixed(1)} GB`;
  if (bytes.length + apart < room) return;
  throw new BackendError(
    `the model's weights take ${size(bytes.length + apart)}, and WebAssembly has room for ${size(room)} (providers: ${provider}): take an export ` +
      "of fewer bits, or the provider webgpu, which keeps weights on the device",
    { backend: name },
  );
}

/**
 * Makes a session on a model that has been read, and closes that.
 * @param options checked already
 */
export async function sessionOn<T extends SessionTypes>(
  engine: Engine,
  file: ModelFile,
  pack: Pack,
  options: SessionOptions,
): Promise<Session<T>> {
  const { trainable = false } = options;
  let bases: Awaited<ReturnType<Pack["bases"]>> | undefined;
  try {
    refuseLarger(file, engine);
    bases = await pack.bases(options);
    const how = {
      ...options,
      foldedInputs: engine.gpu !== undefined,
      joinCores: engine.gpu === undefined,
      integers: options.components === "f32" ? undefined : engine.integers,
      ...(trainable && { mode: "factors" as const }),
    };
    const learning = trainable ? await import("./training.ts") : undefined;
    learning?.refuseParts(file, pack, options.modules);
    const prepared = await prepareModel(file, pack, bases.bytes, how);
    const training = await learning?.addTraining(engine, file, prepared, trainable);
    const { folded } = prepared;
    const supplied = folded && "places" in folded ? [folded.path] : [];
    const detached = await detachWeights(file, prepared.initializers, { ...options, supplied });
    const parts = {
      engine,
      prepared,
      detached,
      probe: options.probe,
      load: training?.load ?? {},
      idle: training?.idle ?? {},
    };
    const { inputNames, outputNames } = prepared;
    const hasCaches = [...inputNames, ...outputNames].some((name) => /^(past|present)/.test(name));
    const { CacheWatch } = hasCaches ? await import("./caches.ts") : {};
    const caches = CacheWatch && new CacheWatch(pack, inputNames, outputNames);
    const delivery = await deliveryOf(parts, file, bases.bytes);
    return new Session<T>(engine, prepared, delivery, parts.idle, training?.graph, caches);
  } catch (error) {
    await file.close();
    throw error;
  } finally {
    bases?.close();
  }
}

async function deliveryOf(parts: SessionParts, file: ModelFile, bases: Uint8Array): Promise<Delivery> {
  const { engine, prepared } = parts;
  const { folded, inputs } = prepared;
  if (!folded) {
    await file.close();
    const { DevicePlacer } = engine.gpu ? await import("./device.ts") : {};
    return inputDelivery(parts, bases, DevicePlacer && ((device) => new DevicePlacer(engine, device, inputs)));
  }
  const { deviceDelivery, foldedDelivery } = await import("./device.ts");
  return "places" in folded ? foldedDelivery(parts, file, folded) : deviceDelivery(parts, file, folded, engine.gpu!);
}
