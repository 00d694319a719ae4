/** The text of kernels/*.wgsl, as `kernels/build.mjs` makes dist/kernels/wgsl.js of it. */
export declare const components: string;
export declare const fold: string;
export declare const scale: string;
