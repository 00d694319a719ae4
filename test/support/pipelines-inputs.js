/** Sounds and pictures for the tiny models of test/data/pipelines; the scripts that made their goldens use the same. */

/** @param {{ waves: [amplitude: number, step: number][], samples: number }} sound */
export function soundOf({ waves, samples }) {
  return Float32Array.from({ length: samples }, (_, i) =>
    waves.reduce((sum, [amplitude, step]) => sum + amplitude * Math.sin(step * i), 0),
  );
}

/** Bytes of 8 × 8 pixels of three colours. */
export function pictureOf(/** @type {number} */ number) {
  return Uint8ClampedArray.from({ length: 8 * 8 * 3 }, (_, i) => (i * (37 + 60 * number) + i * i * 11) % 256);
}
