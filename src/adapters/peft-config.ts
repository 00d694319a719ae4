/**
 * Reads PEFT's `adapter_config.json`: every field is honoured, known to be harmless, or refused by name. Reads no
 * tensors. Field meanings follow peft/tuners/lora/config.py and layer.py of PEFT 0.21; absent fields have PEFT's
 * defaults, since older versions did not write them.
 */

import { AdapterError, isPlain } from "../errors.ts";
import { show } from "../tensor/safetensors.ts";
import type { BaseStart } from "./start.ts";

/** Facts that a configuration gives about the tensors. */
export interface PeftConfig {
  readonly baseModel: string | undefined;
  readonly revision: string | undefined;
  readonly taskType: string | undefined;
  /** Base weights are [in, out] (Conv1D of GPT-2). */
  readonly fanInFanOut: boolean;
  /** Which base biases belong to the adapter. */
  readonly bias: "none" | "all" | "lora_only";
  readonly loraBias: boolean;
  readonly dora: boolean;
  /** Set where PEFT changes the weights of linear layers before it loads the factors (start.ts). */
  readonly start: BaseStart | undefined;
  /** A module is saved when its name ends in one of these. Includes the heads that PEFT saves for the task type. */
  readonly modulesToSave: readonly string[];
  /** Rows replaced by trainable_token_indices: [ending of the embedding's name, indices]; "" matches any. */
  readonly tokenRows: readonly (readonly [ending: string, indices: readonly number[]])[];
  /** Rank and scale that PEFT gives the module of this name. */
  forModule(name: string): { rank: number; scale: number };
}

/** Most characters of a text: a pack holds 4096 bytes (SPEC.md, section 4.2), and a character takes at most three. */
const MAX_TEXT = 1365;

/** PEFT's own way to an adapter of the original base. */
export const CONVERT: string =
  "Convert it in PEFT, where it was trained: save_pretrained(path, path_initial_model_for_weight_conversion=initial_adapter)";

/** Says why an adapter with a start is refused without its base. */
export function withoutBase(start: BaseStart): string {
  return `init_lora_weights is "${start}": PEFT takes the start out of the base when it loads the adapter`;
}

const PLAIN = "Train a plain LoRA, or merge it with PEFT and use the merged model";

/** Fields that give tensors a meaning that low-rank terms cannot express, with the reason. */
const REFUSED: ReadonlyMap<string, string> = new Map([
  ["target_parameters", `puts LoRA on bare parameters (mixture of experts), which are not modules. ${PLAIN}`],
  ["layer_replication", `makes several layers from one base layer, so a module has no weight of its own. ${PLAIN}`],
  ["alora_invocation_tokens", "applies the update after some tokens only (aLoRA): no weight can. Train a plain LoRA"],
  ["use_qalora", `pools the input before lora_A (QALoRA), so lora_A does not fit the base weight. ${PLAIN}`],
  ["use_bdlora", `splits the factors into blocks (BD-LoRA). ${PLAIN}`],
  ["arrow_config", "routes each token to other adapters (Arrow). Pack the adapters it routes to, each as a task"],
  ["kasa_config", `truncates the base weight and adds a diagonal between the factors (KaSA). ${PLAIN}`],
  ["velora_config", "projects lora_A's input while training (VeLoRA). Train a plain LoRA"],
  ["monteclora_config", "samples the factors at random (MonteCLoRA). Train a plain LoRA"],
]);

/**
 * Fields that are read here, and those about the adapter's training or origin, or that repeat what the tensors' names
 * tell.
 */
const KNOWN: ReadonlySet<string> = new Set(
  (
    "alpha_pattern base_model_name_or_path bias ensure_weight_tying fan_in_fan_out init_lora_weights lora_alpha lora_bias " +
    "modules_to_save peft_type r rank_pattern revision task_type trainable_token_indices use_dora use_rslora " +
    "auto_mapping corda_config eva_config exclude_modules inference_mode layers_pattern layers_to_transform loftq_config lora_dropout " +
    "lora_ga_config megatron_config megatron_core merge_weights peft_version qalora_group_size runtime_config target_modules"
  ).split(" "),
);

/** Heads that PEFT saves without being asked (peft_model.py); its early versions did not list them in the file. */
const EMBEDDED_HEADS: ReadonlyMap<string, readonly string[]> = new Map([
  ["SEQ_CLS", ["classifier", "score"]],
  ["TOKEN_CLS", ["classifier", "score"]],
  ["QUESTION_ANS", ["qa_outputs"]],
]);

/** The modules that PEFT saves by itself for a task type. */
export function headsOf(taskType: string | undefined): readonly string[] {
  return EMBEDDED_HEADS.get(taskType ?? "") ?? [];
}

/**
 * Initialisations that change the base by more than its weights tell: by data, gradients, or numbers drawn at random.
 */
const MUTATING = /^(pissa|corda|lora_ga$)/;
const UNTOUCHED: readonly unknown[] = [undefined, null, true, false, "gaussian", "eva", "orthogonal", "mica"];

/**
 * Checks a parsed adapter_config.json.
 * @param file its path, for messages
 * @throws AdapterError naming the field that is refused or invalid
 */
export function readPeftConfig(config: unknown, file: string): PeftConfig {
  if (!isPlain(config)) throw new AdapterError("is not a JSON object; expected PEFT's adapter_config.json", { file });
  const { refuse, wrong, field, numbers } = fieldsOf(config, file);
  if (config.peft_type !== "LORA") throw wrong("peft_type", `"LORA"`, "convert the adapter to LoRA, or train one");
  refuseUnknown(config, refuse);

  const r = field("r", 8, isRank, "a positive integer");
  const alpha = field("lora_alpha", 8, isFiniteNumber, "a number");
  const rankPattern = numbers("rank_pattern", isRank, "positive integer");
  const alphaPattern = numbers("alpha_pattern", isFiniteNumber, "number");
  const flag = (name: string): boolean => field(name, false, isBoolean, "true or false");
  const text = (name: string): string | undefined =>
    field(name, undefined, isText, `a string of ${MAX_TEXT} characters at most, or null`) || undefined;
  const rslora = flag("use_rslora");
  const bias = field("bias", "none", isBias, `"none", "all" or "lora_only"`);
  const modulesToSave = field("modules_to_save", [], isNames, "an array of module names");
  const taskType = text("task_type");

  const start = startOf(config.init_lora_weights, refuse);
  // The file holds what it ties, but for rows of tokens, which reach tied layers with it and without.
  flag("ensure_weight_tying");
  return {
    baseModel: text("base_model_name_or_path"),
    revision: text("revision"),
    taskType,
    fanInFanOut: flag("fan_in_fan_out"),
    bias,
    loraBias: flag("lora_bias"),
    dora: flag("use_dora"),
    start,
    modulesToSave: [...new Set([...modulesToSave, ...headsOf(taskType)])],
    tokenRows: tokenRows(config.trainable_token_indices, (message) => refuse("trainable_token_indices", message)),
    forModule(name) {
      const rank = rankPattern.find(name) ?? r;
      const numerator = alphaPattern.find(name) ?? alpha;
      return { rank, scale: numerator / (rslora ? Math.sqrt(rank) : rank) };
    },
  };
}

type Refuse = (field: string, message: string) => AdapterError;

function fieldsOf(config: Record<string, unknown>, file: string) {
  const refuse: Refuse = (name, message) => new AdapterError(`${name} ${message}`, { file, field: name });
  const wrong = (name: string, expected: string, advice = "correct it in the file"): AdapterError =>
    refuse(name, `is ${show(config[name])}, expected ${expected}; ${advice}`);
  return {
    refuse,
    wrong,
    /** A field's value, or PEFT's default where it is absent or null. */
    field<T>(name: string, absent: T, isValid: (value: unknown) => value is T, expected: string): T {
      const value = config[name] ?? absent;
      if (!isValid(value)) throw wrong(name, expected);
      return value;
    },
    /** Numbers by the expressions that PEFT matches names with. */
    numbers(name: string, isValid: (value: unknown) => value is number, what: string): NamePatterns<number> {
      const value = config[name] ?? {};
      if (!isPlain(value)) throw wrong(name, `an object of ${what}s by pattern`);
      const numbers = Object.entries(value).map(([pattern, number]): [string, number] => {
        if (!isValid(number)) throw refuse(name, `gives ${show(number)} for ${show(pattern)}, expected a ${what}`);
        return [pattern, number];
      });
      return new NamePatterns(numbers, (pattern, why) => refuse(name, `${show(pattern)} ${why}`));
    },
  };
}

/** @throws AdapterError for a field that is set, and refused or unknown */
function refuseUnknown(config: Record<string, unknown>, refuse: Refuse): void {
  for (const [field, value] of Object.entries(config)) {
    if (KNOWN.has(field) || isOff(value)) continue;
    const reason = REFUSED.get(field);
    if (reason !== undefined) throw refuse(field, `is set: it ${reason}`);
    throw refuse(
      field,
      `is ${show(value)}, a field that PEFT 0.21 does not know: delete it from the file if it does not change the maths`,
    );
  }
}

const isBoolean = (value: unknown): value is boolean => typeof value === "boolean";

const isText = (value: unknown): value is string | undefined =>
  value === undefined || (typeof value === "string" && value.length <= MAX_TEXT);

const isBias = (value: unknown): value is PeftConfig["bias"] => ["none", "all", "lora_only"].includes(value as string);

const isNames = (value: unknown): value is string[] =>
  Array.isArray(value) && value.every((name) => typeof name === "string" && name !== "");

const isFiniteNumber = (value: unknown): value is number => Number.isFinite(value);

const isRank = (value: unknown): value is number => Number.isSafeInteger(value) && (value as number) > 0;

/**
 * Tells whether Python takes a value as false. An empty object counts as set: PEFT turns it into a configuration of
 * defaults.
 */
function isOff(value: unknown): boolean {
  return !value || (Array.isArray(value) && value.length === 0);
}

/** @throws AdapterError for a start that changes the base in a way that cannot be computed again */
function startOf(init: unknown, refuse: Refuse): BaseStart | undefined {
  if (UNTOUCHED.includes(init)) return undefined;
  const name = typeof init === "string" ? init.toLowerCase() : "";
  if (name === "pissa" || name === "olora") return name;
  if (MUTATING.test(name)) {
    throw refuse(
      "init_lora_weights",
      `is ${show(init)}: the adapter was trained against a changed base, which the original does not determine. ${CONVERT}`,
    );
  }
  if (name === "loftq") {
    throw refuse(
      "init_lora_weights",
      'is "loftq": the adapter was trained against the quantised base that LoftQ made. Save that base ' +
        "(model.get_base_model().save_pretrained), use it, and set init_lora_weights to true in the file",
    );
  }
  throw refuse(
    "init_lora_weights",
    `is ${show(init)}, which PEFT 0.21 does not know: set it to true in the file if the base stayed as it was`,
  );
}

function tokenRows(value: unknown, refuse: (message: string) => AdapterError): [string, number[]][] {
  if (value === undefined || value === null) return [];
  if (!Array.isArray(value) && !isPlain(value)) {
    throw refuse(`is ${show(value)}, expected an array of row numbers, or an object of such by embedding name`);
  }
  const entries = Array.isArray(value) ? ([["", value]] as const) : Object.entries(value);
  return entries.map(([ending, rows]) => {
    if (!Array.isArray(rows) || !rows.every((row) => Number.isSafeInteger(row) && row >= 0)) {
      throw refuse(`has ${show(rows)}${ending && ` for ${show(ending)}`}, expected an array of row numbers ≥ 0`);
    }
    if (new Set(rows).size !== rows.length) throw refuse("names a row twice, which has no defined result; train again");
    return [ending, rows as number[]];
  });
}

// The regular expressions by which PEFT gives modules a rank and a scale of their own (`get_pattern_key` of
// peft/utils/other.py: `re.match(r"(.*\.)?(PATTERN)$", name)`, the first match counts). Patterns come from untrusted
// files, and engines backtrack, which can take exponential time. So repeated groups are refused, and the ways to match
// what is left are counted before the engine runs.

/** Longest pattern, in characters. Patterns of people and of PEFT are mostly names of modules. */
const MAX_LENGTH = 1024;
/**
 * Most characters compared for all names of an adapter, which take seconds. 6 000 modules with a pattern for each need
 * a quarter.
 */
const MAX_COMPARED = 1e10;

/** Refuses a pattern. @param why ends a sentence about it, and says what to do */
type RefusePattern = (pattern: string, why: string) => Error;

interface Compiled {
  readonly expression: RegExp;
  /** Combinations of alternatives and of bounded repetitions, at most. */
  readonly ways: number;
  /** Number of repetitions without a bound. */
  readonly unbounded: number;
}

/** Values by pattern. */
export class NamePatterns<T> {
  readonly #patterns: readonly (readonly [pattern: string, value: T, compiled: Compiled])[];
  readonly #refuse: RefusePattern;
  #compared = 0;

  /** @throws the error that `refuse` makes, for a pattern that is invalid or not supported */
  constructor(entries: readonly (readonly [pattern: string, value: T])[], refuse: RefusePattern) {
    this.#refuse = refuse;
    this.#patterns = entries.map(([pattern, value]) => [
      pattern,
      value,
      compile(pattern, (why) => refuse(pattern, `${why}; write the modules' names instead`)),
    ]);
  }

  /**
   * The value of the first pattern that matches the name of a module; undefined where none does.
   * @throws the error that `refuse` makes, where several patterns match, or all together may take too long
   */
  find(name: string): T | undefined {
    const starts = [0, ...[...name.matchAll(/\./g)].map(({ index }) => index + 1)];
    let first: { pattern: string; value: T } | undefined;
    for (const [pattern, value, { expression, ways, unbounded }] of this.#patterns) {
      for (const start of starts) this.#compared += pattern.length * ways * splits(name.length - start, unbounded);
      if (this.#compared > MAX_COMPARED)
        throw this.#refuse(pattern, "may take too long for the modules there are; write fewer patterns, or names");
      if (!expression.test(name)) continue;
      // JavaScript objects put numeric keys in front, wherever they were in the file.
      if (first === undefined && !/^\d+$/.test(pattern)) return value;
      if (first !== undefined && first.value !== value)
        throw this.#refuse(first.pattern, `matches ${name} as another one does; give each module one pattern`);
      first ??= { pattern, value };
    }
    // PEFT looks the name itself up where nothing matches it.
    return first?.value ?? this.#patterns.find(([pattern]) => pattern === name)?.[1];
  }
}

/** Ways to divide `length` characters among some repetitions and the rest: a binomial coefficient. */
function splits(length: number, repetitions: number): number {
  let ways = 1;
  for (let i = 1; i <= repetitions; i++) ways *= (length + i) / i;
  return ways;
}

/** Classes as Python defines them for a `str`, as members of a set. A byte order mark is no space to Python. */
const CLASSES: ReadonlyMap<string, string> = new Map([
  ["\\d", "\\p{Nd}"],
  ["\\w", "\\p{L}\\p{N}_"],
  ["\\s", "\\p{White_Space}"],
]);
/** The beginning of a group; its end, with a repetition; an alternative, a set, an escape, a repetition. */
const PIECE = /\((?:\?.?)?|\)[*+{]?|\||\[\^?\]?(?:\\.|[^\]\\])*\]?|\\.?|[*+?]|\{(\d*)(,?)(\d*)\}/gsu;

/**
 * Python's expression as JavaScript writes it, which finds what else is wrong.
 * @param refuse makes an error of a reason
 */
function compile(pattern: string, refuse: (why: string) => Error): Compiled {
  if (pattern.length > MAX_LENGTH) throw refuse(`has ${pattern.length} characters, ${MAX_LENGTH} at most are read`);
  let ways = 1;
  let unbounded = 0;
  /** Alternatives of the open groups, the innermost last. */
  const open = [1];
  const source = pattern.replace(PIECE, (piece: string, from = "", comma = "", to = "") => {
    if (piece.startsWith("(")) {
      if (piece !== "(" && piece !== "(?:") throw refuse(`has a group "${piece}"`);
      open.push(1);
      return "(?:";
    }
    if (piece.startsWith(")")) {
      if (piece.length > 1) throw refuse("repeats a group");
      ways *= open.pop()!;
      if (open.length === 0) throw refuse('has a ")" without "("');
    } else if (piece === "|") open[open.length - 1]!++;
    else if (piece === "*" || piece === "+" || (piece.startsWith("{") && comma && !to)) unbounded++;
    else if (piece === "?") ways *= 2;
    else if (piece.startsWith("{")) ways *= Math.max(1, Number(to || from) - Number(from) + 1);
    else if (piece.startsWith("[")) return setOf(piece, refuse);
    else {
      const members = CLASSES.get(piece.toLowerCase());
      return members ? `[${piece === piece.toLowerCase() ? "" : "^"}${members}]` : literal(piece, refuse);
    }
    return piece.startsWith("{,") ? `{0${piece.slice(1)}` : piece;
  });
  ways *= open[0]!;
  try {
    return { expression: new RegExp(`(?:^|\\.)(?:${source})$`, "su"), ways, unbounded };
  } catch (cause) {
    throw refuse(`is no regular expression (${(cause as Error).message.split(": ").at(-1)})`);
  }
}

/** A set in brackets. A "]" that comes first is one of its characters. */
function setOf(piece: string, refuse: (why: string) => Error): string {
  const [, negated = "", inside = ""] = /^\[(\^|(?!\^))(.+)\]$/su.exec(piece) ?? [];
  if (inside === "") throw refuse('has a "[" without "]"');
  return `[${negated}${inside.replace(/\\.|[[\]]/gsu, (part) => CLASSES.get(part) ?? literal(part, refuse))}]`;
}

/** A character that may be escaped, by its number. */
function literal(piece: string, refuse: (why: string) => Error): string {
  if (/^\\[A-Za-z\d]/.test(piece)) throw refuse(`has "${piece}"`);
  return piece === "\\"
    ? piece
    : `\\u{${piece.codePointAt(piece.length > 1 && piece.startsWith("\\") ? 1 : 0)!.toString(16)}}`;
}
