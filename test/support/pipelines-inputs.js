/** Sounds and pictures for the tiny models of test/data/pipelines; the scripts that made their goldens use the same. */

/** @param {{ waves: [amplitude: number, step: number][], samples: number }} sound */
function soundOf({ waves, samples }) {
  return Float32Array.from({ length: samples }, (_, i) =>
    waves.reduce((sum, [amplitude, step]) => sum + amplitude * Math.sin(step * i), 0),
  );
}

/** Bytes of 8 × 8 pixels of three colours. */
function pictureOf(/** @type {number} */ number) {
  return Uint8ClampedArray.from({ length: 8 * 8 * 3 }, (_, i) => (i * (37 + 60 * number) + i * i * 11) % 256);
}

/**
 * Input of a pipeline, in which sounds and pictures take the places of their descriptions.
 * @param {any} value @param {any} RawImage of transformers.js
 * @returns {unknown}
 */
export function inputOf(value, RawImage) {
  if (Array.isArray(value)) return value.map((one) => inputOf(one, RawImage));
  if (value?.waves) return soundOf(value);
  return value?.picture === undefined ? value : new RawImage(pictureOf(value.picture), 8, 8, 3);
}
