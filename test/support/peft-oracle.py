"""PEFT's own judgement of exported adapters: loads each into its base, merges, compares with the golden merge.

usage: peft-oracle.py GOLDENS EXPORTED
EXPORTED holds one folder per case of GOLDENS. Prints one JSON object: case -> largest difference over the largest |W| of
its tensor, or what went wrong. The adapted weights come from the golden base. Exits with 3 when torch, transformers, peft or safetensors cannot be imported.
"""
import json, os, pathlib, sys, warnings

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "data/make"))
sys.dont_write_bytecode = True

os.environ["HF_HUB_OFFLINE"] = "1"
try:
    from peft import PeftModel
    from peft_models import Convs, bert, gpt2, llama
    from safetensors.torch import load_file
except ImportError as missing:
    print(missing, file=sys.stderr)
    sys.exit(3)


MODELS = {"all-linear": llama, "layers": llama, "fan-in-fan-out": gpt2, "dora-fan-in-fan-out": gpt2, "conv": Convs, "conv-dora": Convs}


def difference(golden, exported):
    model = MODELS.get(golden.name, bert)().eval()
    model.load_state_dict(load_file(golden / "base.safetensors"), strict=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(model, exported)
    said = [str(w.message) for w in caught if "missing" in str(w.message).lower() or "mismatch" in str(w.message).lower()]
    if said:
        return said[0]
    merged = model.merge_and_unload().state_dict()
    worst = 0.0
    for name, expected in load_file(golden / "merged.safetensors").items():
        found = merged[name].double()
        worst = max(worst, ((found - expected.double()).abs().max() / expected.double().abs().max()).item())
    return worst


goldens, exported = map(pathlib.Path, sys.argv[1:])
result = {}
for folder in sorted(exported.iterdir()):
    try:
        result[folder.name] = difference(goldens / folder.name, folder)
    except Exception as error:
        result[folder.name] = f"{type(error).__name__}: {error}"
print(json.dumps(result))
