/**
 * Browsers and workers have their own WebGPU or none: `#gpu` of package.json is this unless the condition `node` is
 * set.
 */
export const openDawn: (() => Promise<object>) | undefined = undefined;
