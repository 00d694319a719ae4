/**
 * The canonical adapter: the result of every reader and the input of extraction. Scales are already multiplied into B, orientation and
 * naming differences are gone, and nothing in the file has been dropped: a reader refuses what this form cannot express.
 *
 * Tensors are read on demand, one module at a time, so that packing many adapters holds one module's stack in memory.
 */
import type { Layout, ParameterRole, TaskMetadata } from "../format/format.ts";
import type { SourceInput } from "../source.ts";
import type { TensorFile } from "../tensor/tensor-file.ts";
import type { Term } from "../tensor/term.ts";
import { readTaskMetadata } from "./metadata.ts";

/** An adapted layer of the base model. */
export interface ModuleShape {
  /** Name as in the adapter, without PEFT's prefix: "bert.encoder.layer.0.attention.self.query". */
  readonly name: string;
  readonly out: number;
  /** Input width; for convolutions input channels times kernel size. */
  readonly in: number;
  readonly layout: Layout;
  /** Kernel size of a convolution, for instance [3, 3]. */
  readonly kernel?: readonly number[] | undefined;
}

/** One adapted module: ΔW [out, in] = B · A, read lazily. */
export interface AdapterModule extends ModuleShape {
  readonly rank: number;
  /**
   * Reads and checks the term of this rank, with the adapter's scale in B. @throws AdapterError naming file and tensor for NaN or
   * infinity
   */
  read(): Promise<Term>;
}

/**
 * A tensor of the base model that the task brings along, by parameter name ("classifier.weight").
 * `saved` replaces the whole parameter (modules_to_save). `bias` replaces a bias vector. `bias-delta` [out] is added to a
 * bias. `rows` replaces the rows `indices` of an embedding [vocabulary, dimension].
 */
export interface SavedTensor {
  readonly name: string;
  readonly role: ParameterRole;
  /** Shape of the tensor; for `rows` [indices.length, dimension]. */
  readonly shape: readonly number[];
  readonly indices?: readonly number[] | undefined;
  /** Reads and checks the values, as f32. @throws AdapterError for NaN or infinity */
  read(): Promise<Float32Array>;
}

/** One trained adapter. */
export interface Adapter {
  /** Task id: the name of the folder or file. */
  readonly id: string;
  /** Path, for messages. */
  readonly file: string;
  /** Size of the tensor file in bytes. */
  readonly byteLength: number;
  /** `base_model_name_or_path` of the configuration. */
  readonly baseModel: string | undefined;
  /** Modules by name, sorted. */
  readonly modules: ReadonlyMap<string, AdapterModule>;
  readonly saved: readonly SavedTensor[];
  readonly metadata: TaskMetadata;
  /** Warnings to read before trusting the result. */
  readonly warnings: readonly string[];
  close(): Promise<void>;
}

/** What a reader finds in an open file; the rest of an adapter has defaults. */
type Found = Pick<Adapter, "modules" | "saved"> & Partial<Pick<Adapter, "baseModel" | "metadata" | "warnings">>;

/**
 * Reads an adapter from one file of tensors: the common frame of the readers of all formats. Closes the file if `read` fails.
 * @param open opens the file
 * @param read reads the adapter; `metadata` is that of task.json
 * @throws errors of `open` and `read`; AdapterError for an invalid task.json
 */
export async function readAdapterFile<F extends TensorFile & { close(): Promise<void> }>(
  {
    id,
    file,
    tensors,
    task,
  }: Pick<Adapter, "id" | "file"> & { readonly tensors: SourceInput; readonly task?: unknown },
  open: (input: SourceInput) => Promise<F>,
  read: (found: F, metadata: TaskMetadata) => Found | Promise<Found>,
): Promise<Adapter> {
  const metadata = readTaskMetadata(task, `${file}/task.json`);
  const found = await open(tensors);
  const { byteLength, close } = found;
  try {
    return {
      id,
      file,
      byteLength,
      baseModel: undefined,
      metadata,
      warnings: [],
      ...(await read(found, metadata)),
      close,
    };
  } catch (error) {
    await close();
    throw error;
  }
}
