"""Runs the Python of one page, block after block, in the current folder. Started by test/pages/examples.test.ts.

Reads blocks.json. Prints a JSON list on the last line: {} for a block that ran, {"absent": package} or {"error": …} for another. A page's "my-base"
is a small BERT with the tokenizer in ./minilm.
"""
import contextlib, json, os, sys, traceback, warnings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
warnings.filterwarnings("ignore")


def base():
    from transformers import AutoTokenizer, BertConfig, BertModel

    small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    tokenizer = AutoTokenizer.from_pretrained("minilm")
    BertModel(BertConfig(vocab_size=len(tokenizer), **small)).save_pretrained("my-base")
    tokenizer.save_pretrained("my-base")


missing = None


def run(code, names):
    global missing
    try:
        if "my-base" in code and not os.path.exists("my-base"):
            base()
        exec(code, names)
    except ModuleNotFoundError as error:
        missing = error.name
        return {"absent": missing}
    except Exception as error:
        # The block before it that could not run makes the names that it needs.
        if missing and isinstance(error, NameError):
            return {"absent": missing}
        return {"error": traceback.format_exc()}
    return {}


with contextlib.redirect_stdout(sys.stderr):
    names = {}
    results = [run(block["code"], names) for block in json.load(open("blocks.json"))]
print(json.dumps(results))
