/**
 * Names of the web platform that public types use, for compilers that have neither the DOM library nor another that
 * declares them. Where there is one, its interfaces and these empty ones merge, and are what they were.
 */
declare global {
  interface AbortSignal {}
  interface Blob {}
  interface CryptoKey {}
  interface CryptoKeyPair {}
  interface RequestInit {}
  interface Response {}
  interface URL {}
  namespace WebAssembly {
    interface Module {}
  }
}

export {};
