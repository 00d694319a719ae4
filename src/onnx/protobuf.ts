/**
 * The protobuf runtime (@bufbuild/protobuf, Apache-2.0) and ONNX's schema, as one module: the build bundles the library into
 * it, so that the package has no dependency and users of `eigenlora/onnx` load only what is used.
 */
export { create, fromBinary, toBinary } from "./message.ts";
export {
  AttributeProtoSchema,
  GraphProtoSchema,
  ModelProtoSchema,
  NodeProtoSchema,
  OperatorSetIdProtoSchema,
  TensorProtoSchema,
  ValueInfoProtoSchema,
} from "./onnx_pb.ts";
