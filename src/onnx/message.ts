/**
 * The used parts of the protobuf runtime (@bufbuild/protobuf), with types of our own: the library is bundled, so its types are missing
 * when a user's compiler reads ours.
 */
import * as library from "@bufbuild/protobuf";
import * as generated from "@bufbuild/protobuf/codegenv2";
import { configureTextEncoding } from "@bufbuild/protobuf/wire";
import { fromUtf8, toUtf8 } from "../text.ts";

// Runs before the first schema is read, which happens when its module is loaded.
if (typeof TextDecoder === "undefined" || typeof TextEncoder === "undefined")
  configureTextEncoding({ encodeUtf8: toUtf8, decodeUtf8: fromUtf8, checkUtf8: () => true });

/** Fields of all messages. */
export type Message<Name extends string = string> = {
  readonly $typeName: Name;
  /** Fields that the schema does not name; written back unchanged. */
  $unknown?: { readonly no: number; readonly wireType: number; readonly data: Uint8Array }[] | undefined;
};

/** The description of a .proto file. */
export interface GenFile {
  readonly kind: "file";
}

/** The description of a message. */
export interface GenMessage<M extends Message> {
  readonly kind: "message";
  readonly typeName: M["$typeName"];
  /** Never present; ties the description to the type. */
  readonly message?: M;
}

/** Values that `create` accepts for a field. */
type Field<F> = F extends Uint8Array | bigint | boolean | string | number | undefined
  ? F
  : F extends readonly (infer Item)[]
    ? Field<Item>[]
    : F extends Message
      ? Init<F>
      : F extends { case: infer Case extends string; value: infer Value }
        ? { case: Case; value: Field<Value> }
        : F;

/** A message, or some of its fields. */
type Init<M extends Message> = M | { [Key in Exclude<keyof M, keyof Message>]?: Field<M[Key]> };

export const fileDesc = generated.fileDesc as unknown as (base64: string) => GenFile;
export const messageDesc = generated.messageDesc as unknown as <M extends Message>(
  file: GenFile,
  index: number,
  ...nested: number[]
) => GenMessage<M>;

/** Makes a message of the given fields; the others get default values. */
export const create = library.create as unknown as <M extends Message>(
  schema: GenMessage<M>,
  init?: NoInfer<Init<M>>,
) => M;
/** @throws Error when the bytes are no such message */
export const fromBinary = library.fromBinary as unknown as <M extends Message>(
  schema: GenMessage<M>,
  bytes: Uint8Array,
) => M;
export const toBinary = library.toBinary as unknown as <M extends Message>(
  schema: GenMessage<M>,
  message: M,
) => Uint8Array<ArrayBuffer>;
