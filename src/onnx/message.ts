/**
 * The part of the protobuf runtime (@bufbuild/protobuf) that is used here, with types of our own: the library is bundled,
 * and its types are not there when a user's compiler reads ours.
 */
import * as library from "@bufbuild/protobuf";
import * as generated from "@bufbuild/protobuf/codegenv2";
import { configureTextEncoding } from "@bufbuild/protobuf/wire";
import { fromUtf8, toUtf8 } from "../text.ts";

// Before the first schema is read, which happens when its module is loaded.
if (typeof TextDecoder === "undefined" || typeof TextEncoder === "undefined")
  configureTextEncoding({ encodeUtf8: toUtf8, decodeUtf8: fromUtf8, checkUtf8: () => true });

/** What all messages have. */
export type Message<Name extends string = string> = {
  readonly $typeName: Name;
  /** Fields that the schema does not name; written back as they were. */
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
  /** Never there; ties the description to the type. */
  readonly message?: M;
}

/** What `create` takes for a field. */
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

/** A message of default values and those given. */
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
