/** Runtimes, on hosts of every kind. */
import {
  createRuntime,
  type Pack,
  type Runtime,
  type RuntimeOptions,
  type Tensor,
  type View,
  type WeightHost,
} from "eigenlora";
import { dawnMissing } from "../backend-list.ts";
import { openSafetensors, openSource } from "../internals.ts";
import { data } from "../packs.ts";
import {
  aborted,
  brief,
  type Call,
  type Calls,
  changing,
  closed,
  digits,
  type Kind,
  late,
  must,
  outcome,
  refusalOf,
  to,
  watchBy,
  without,
} from "./harness.ts";
import { checkCounts, packOf } from "./material.ts";

interface Running {
  readonly pack: Pack;
  readonly runtime: Runtime;
  /** A state that belongs to no task. */
  mixture: string;
}
const WEIGHTS = data("sessions/base-mlp.safetensors");
const tensors = new Map<string, Tensor>();
const source = await openSource(WEIGHTS);
const weights = await openSafetensors(source);
for (const [name, { shape }] of weights.tensors)
  tensors.set(name, { dtype: "f32", shape, data: await weights.readF32(name) });
await source.close?.();
const copyOfBase = (): Map<string, Tensor> =>
  new Map([...tensors].map(([name, { data, ...tensor }]) => [name, { ...tensor, data: data.slice() as Float32Array }]));

/** A host whose writes are late, and take effect together. */
function slowHost(): WeightHost {
  const live = copyOfBase();
  const view = (name: string): View | undefined => {
    const { data, ...tensor } = live.get(name) ?? {};
    return data && { ...(tensor as Tensor), data: new Uint8Array(data.buffer), byteOffset: 0 };
  };
  return {
    *list() {
      for (const [name, { dtype, shape }] of tensors) yield { name, dtype, shape };
    },
    read: (name) => late().then(() => view(name)!),
    view,
    begin() {
      const written = new Map<string, Tensor | null>();
      return {
        write(name, value) {
          const data = value && new Float32Array((value.data as Uint8Array).slice().buffer);
          written.set(name, value && { ...value, data: data! });
          return late();
        },
        async commit() {
          await late();
          for (const [name, value] of written) value ? live.set(name, value) : live.delete(name);
        },
        rollback: () => late(),
      };
    },
  };
}

const floats = ({ data, byteOffset, shape }: View): string =>
  digits(
    new Float32Array(
      (data as Uint8Array).slice(byteOffset).buffer,
      0,
      shape.reduce((a, b) => a * b, 1),
    ),
  );
const beginning = ({ data }: View): string => String((data as Uint8Array).subarray(0, 12));
/** State of the model: the active task, and its parameters. */
function now({ runtime }: Running, as: (view: View) => unknown = floats): string {
  const parameters = [...runtime.changes()].map(([name, view]) => [name, as(view)] as const);
  const terms = runtime.mode === "folded" ? [] : runtime.pack.modules.map(({ name }) => runtime.term(name)?.Bt[0]);
  return JSON.stringify([runtime.task, parameters.sort(([x], [y]) => (x < y ? -1 : 1)), terms]);
}

const runtimeCalls: Calls<Running> = {
  "switch to a": ({ runtime }) => to((task) => runtime.switchTask(task), "a"),
  "switch to the base": ({ runtime }) => to((task) => runtime.switchTask(task), null),
  "switch to a blend": ({ runtime }) => changing((blend) => runtime.switchTask(blend, { head: "a" })),
  "switch to what is not there": ({ runtime }) => runtime.switchTask("x"),
  "switch, broken off": aborted(({ runtime }, signal) => to((task) => runtime.switchTask(task, { signal }), "a")),
  apply: ({ runtime, pack }) => {
    const { name, in: inputs, out } = pack.modules[0]!;
    const [x, y] = [inputs, out].map((width): View => {
      return {
        dtype: "f32",
        shape: [1, width],
        data: new Uint8Array(new Float32Array(width).fill(1).buffer),
        byteOffset: 0,
      };
    });
    return runtime.apply(name, x!, y!).then(() => floats(y!));
  },
  readWeight: ({ runtime, pack }) => runtime.readWeight(pack.modules[0]!.name).then(floats),
  "removeTask a": ({ pack }) => pack.removeTask("a"),
  lose: async ({ runtime }) => {
    const device = runtime.device as GPUDevice;
    device.destroy();
    await device.lost;
  },
  close: ({ runtime, pack }) => {
    const { name } = pack.modules[0]!;
    return closed(runtime.close(), [
      () => runtime.switchTask("a"),
      () => runtime.readWeight(name),
      () => runtime.changes(),
    ]);
  },
};

/** Runtimes on a base of their own, without some of the calls. */
function kindOf(how: string, options: () => RuntimeOptions, ...not: string[]): Kind<Running> {
  const onDevice = options().backend === "webgpu";
  const whole = new Set<string>();
  const open = async (): Promise<Running> => {
    const pack = await packOf();
    return { pack, runtime: await createRuntime(pack, options()), mixture: "" };
  };
  const learn = async (on: Running): Promise<void> => {
    for (const one of [null, "a", { a: 0.5, b: 0.25 }, "b"]) {
      await on.runtime.switchTask(one, { head: typeof one === "object" && one ? "a" : undefined });
      if (!onDevice) whole.add(now(on, beginning));
    }
  };
  return {
    name: `a runtime, ${how}`,
    skip: onDevice ? dawnMissing : undefined,
    calls: without(runtimeCalls, ...not),
    // The device is lost in between.
    refused: onDevice ? /^\[\["backend"\],\[null\],\["b"/ : undefined,
    async open() {
      const on = await open();
      if (whole.size === 0) await learn(on);
      else await on.runtime.switchTask("b");
      const watch = (): void => {
        try {
          const found = now(on, beginning);
          if (!whole.has(found)) on.mixture ||= found;
        } catch (error) {
          if (refusalOf(error) !== "backend") on.mixture ||= refusalOf(error);
        }
      };
      watchBy(onDevice ? undefined : watch);
      return on;
    },
    async look(on) {
      const { runtime, pack } = on;
      watchBy(undefined);
      must(on.mixture === "", `it was between two tasks: ${on.mixture}`);
      const state = (): unknown => (onDevice ? (runtimeCalls["readWeight"] as Call<Running>)(on) : brief(now(on)));
      const found: unknown[] = [runtime.task, await outcome(state)];
      for (const task of ["a", null]) {
        found.push(await outcome(() => to((one) => runtime.switchTask(one), task)), await outcome(state));
      }
      await runtime.close();
      return [...found, typeof runtime.memory().total, [...pack.tasks.keys()], await checkCounts(pack)];
    },
  };
}

const recreate = { backend: "webgpu", base: WEIGHTS, webgpu: { recreate: true } } as const;
export const RUNTIMES: readonly Kind<any>[] = [
  kindOf("folded in memory", () => ({ backend: "js", base: copyOfBase() }), "apply", "lose"),
  kindOf("folded in a host", () => ({ backend: "js", base: slowHost() }), "apply", "lose"),
  kindOf("with terms", () => ({ backend: "js", base: copyOfBase(), mode: "core" }), "readWeight", "lose"),
  kindOf(
    "on a device",
    () => recreate,
    ...Object.keys(runtimeCalls).filter((name) => !/to a$|readWeight|lose|close/.test(name)),
  ),
];
