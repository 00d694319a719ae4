"""The examples in examples/python as their readers run them, and what PEFT answers with the adapters that they save.

usage: training-oracle.py EXAMPLES JOBS.json
JOBS: {"wrong": [[MODEL, COMPONENTS]], "runs": [{"script": "train" or "train_llm", "given": [MODEL, COMPONENTS, ROWS, OUT, STEPS, BATCH], "asked": […]}],
"notebook": {"folder": …, "steps": …, "asked": […]} or null, "bases": [MODEL, COMPONENTS, ROWS, OUT] or null}. Prints {"runs": [{"trained", "logits", "again"}],
"notebook": {"logits"}, "wrong": [messages], "bases": {"float16" and "bfloat16": whether what was saved is finite f32, "nan": message, "saved": whether there is a file}}:
how many numbers learn; logits of a fresh base with the saved adapter, of a language model those of the last token; how far a model is off
that has read the adapter as a checkpoint. Exits with 3 when torch, transformers, peft or safetensors cannot be imported.
"""
import contextlib, importlib, json, os, sys, warnings

os.environ["HF_HUB_OFFLINE"] = "1"
try:
    import torch
    from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
except ImportError as missing:
    print(missing, file=sys.stderr)
    sys.exit(3)

warnings.filterwarnings("ignore")
torch.set_num_threads(1)
examples, jobs = sys.argv[1], json.load(open(sys.argv[2]))
sys.path.insert(0, examples)
# The folder of the examples is published as it is.
sys.dont_write_bytecode = True
from components import inside

TYPES = {"SEQ_CLS": AutoModelForSequenceClassification, "CAUSAL_LM": AutoModelForCausalLM}


def base(folder, tuned):
    """A fresh base of the kind of a tuned model."""
    labels = {"num_labels": tuned.config.num_labels} if tuned.peft_config["default"].task_type == "SEQ_CLS" else {}
    return TYPES[tuned.peft_config["default"].task_type].from_pretrained(folder, dtype=torch.float32, **labels)


@torch.no_grad()
def logits(model, folder, asked):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = [model(**tokenizer(text, return_tensors="pt", add_special_tokens=model.config.is_encoder_decoder or "cls_token" in tokenizer.special_tokens_map)).logits[0] for text in asked]
    return [one[-1] if one.ndim == 2 else one for one in found]


def run(script, given, asked):
    tuned = importlib.import_module(script).train(*given).eval()
    folder, components, _, out = given[:4]
    saved = logits(PeftModel.from_pretrained(base(folder, tuned), out).eval(), folder, asked)
    config = tuned.peft_config["default"]
    other = inside(base(folder, tuned), components, config.task_type, config.r).eval()
    set_peft_model_state_dict(other, get_peft_model_state_dict(tuned))
    again = max(float((a - b).abs().max()) for a, b in zip(saved, logits(other, folder, asked)))
    trained = sum(value.numel() for name, value in tuned.named_parameters() if value.requires_grad)
    return {"trained": trained, "logits": [one.tolist() for one in saved], "again": again}


def notebook(folder, steps, asked):
    os.chdir(folder)
    cells = json.load(open(os.path.join(examples, "train.ipynb")))["cells"]
    names = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]).replace("steps=240)", f"steps={steps})"), names)
    tuned = names["tuned"]
    saved = PeftModel.from_pretrained(base("my-model", tuned), "adapters/mine").eval()
    return {"logits": [one.tolist() for one in logits(saved, "my-model", asked)]}


def refusal(model, components):
    try:
        inside(AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(model)), components, "SEQ_CLS")
    except ValueError as error:
        return str(error)


def bases(model, components, rows, out):
    """Trains on the model as f16 and as bf16 checkpoints hold it, and on one whose loss is not a number."""
    train, found = importlib.import_module("train").train, {}
    for name in ("float16", "bfloat16", "nan"):
        copy = AutoModel.from_pretrained(model, dtype=torch.float32)
        if name == "nan":
            copy.encoder.layer[0].output.dense.weight.data[:] = float("nan")
        (copy if name == "nan" else copy.to(getattr(torch, name))).save_pretrained(name)
        AutoTokenizer.from_pretrained(model).save_pretrained(name)
        try:
            train(name, components, rows, f"{out}/{name}", 2, 8)
            saved = load_file(f"{out}/{name}/adapter_model.safetensors").values()
            found[name] = all(value.dtype == torch.float32 and bool(value.isfinite().all()) for value in saved)
        except FloatingPointError as error:
            found[name] = str(error)
    return {**found, "saved": os.path.exists(f"{out}/nan/adapter_model.safetensors")}


with contextlib.redirect_stdout(sys.stderr):
    result = {
        "runs": [run(**job) for job in jobs["runs"]],
        "wrong": [refusal(*pair) for pair in jobs["wrong"]],
        "bases": jobs["bases"] and bases(*jobs["bases"]),
        "notebook": jobs["notebook"] and notebook(**jobs["notebook"]),
    }
print(json.dumps(result))
