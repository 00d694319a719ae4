/**
 * Runs in a browser, in a window or a worker: the backend suite and PEFT's golden pairs. backends-chromium.test.ts
 * judges the findings.
 */
/// <reference types="@webgpu/types" />
import type { BackendOptions } from "eigenlora";
import { webgpu } from "eigenlora/webgpu";
import { backendSuite } from "./backend-suite.ts";
import { checkGolden, type Golden } from "./compare.ts";
import { createBackend, createWebgpuBackend } from "./internals/runtime.ts";
import { type Finding, record } from "./stand-in.ts";

/** A backend, with `gpu` for WebGPU, since options travel to the page as JSON. */
export type BrowserBackend = BackendOptions & { readonly gpu?: true };

export interface Entry {
  /** WebGPU in this browser, if any: the adapter and its features. */
  adapter(): Promise<{ description: string; features: string[] } | undefined>;
  /** The suite on a backend. WebGPU runs on a device that asks for no features. */
  suite(name: string, options: BrowserBackend): Promise<Finding[]>;
  /** The golden pairs on a backend, which asks for its device itself. */
  goldens(name: string, options: BrowserBackend, goldens: readonly Golden[]): Promise<Finding[]>;
}

const requestAdapter = async (): Promise<GPUAdapter | null> => (await navigator.gpu?.requestAdapter()) ?? null;

async function plainDevice(): Promise<GPUDevice> {
  const adapter = await requestAdapter();
  if (!adapter) throw new Error("webgpu is required, but this browser has no adapter");
  return adapter.requestDevice();
}

export const entry: Entry = {
  async adapter() {
    const adapter = await requestAdapter();
    if (!adapter) return undefined;
    const { vendor, architecture, description } = adapter.info;
    return {
      description: [vendor, architecture, description].join(" ").trim(),
      features: [...adapter.features].sort(),
    };
  },

  async suite(name, options) {
    if (!options.gpu) {
      return record(name, (t) => backendSuite(t, async () => (await createBackend(options)).backend));
    }
    const device = await plainDevice();
    const findings = await record(name, (t) => backendSuite(t, () => createWebgpuBackend({ device }), true));
    device.destroy();
    return findings;
  },

  goldens: (name, { gpu, ...options }, goldens) =>
    record(name, async (t) => {
      for (const golden of goldens) await checkGolden(t, golden, gpu ? { backend: webgpu() } : options);
    }),
};
