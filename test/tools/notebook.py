"""Writes examples/python/train.ipynb from components.py and train.py, which it repeats.

usage: notebook.py EXAMPLES [OUT.ipynb]
"""
import json
import sys
from pathlib import Path

examples = Path(sys.argv[1])
out = Path(sys.argv[2]) if len(sys.argv) > 2 else examples / "train.ipynb"


def code_of(name):
    """A script without what runs it, and without imports from its neighbour."""
    text = (examples / name).read_text().split('\n\nif __name__ == "__main__":')[0]
    return "\n".join(line for line in text.split("\n") if not line.startswith("from components import")).strip()


CELLS = [
    ("markdown", """# Train a task within the components of a pack

A LoRA of PEFT whose factors lie in the directions that the tasks of a pack share. Coefficients alone are trained, some thousands of numbers, and
`eigenlora add` takes the adapter into the pack without loss.

Beside this notebook: the folder `my-model`, which is the base of the pack, and `rows.jsonl` with `{"text": "…", "label": "…"}` on each line.
Install `torch`, `transformers` and `peft`. The components come out of the pack by

```sh
npx eigenlora export tasks.eigen --components -o components.safetensors
```"""),
    ("code", code_of("components.py")),
    ("code", code_of("train.py")),
    ("markdown", "The rate falls from 0.04 to 0. More steps help tasks with many rows."),
    ("code", 'tuned = train("my-model", "components.safetensors", "rows.jsonl", "adapters/mine", steps=240)'),
    ("markdown", "What the trained task says of one line:"),
    ("code", """tokenizer = AutoTokenizer.from_pretrained("my-model")
labels = json.loads(Path("adapters/mine/task.json").read_text())["labels"]
tuned.eval()
with torch.no_grad():
    scores = tuned(**tokenizer("a fast mail reader for the terminal", return_tensors="pt").to(tuned.device)).logits[0].softmax(-1)
print(dict(zip(labels, scores.tolist())))"""),
    ("markdown", """Now the adapter becomes a task of the pack, some kilobytes large:

```sh
npx eigenlora add tasks.eigen adapters/mine --max-loss 0.001
```"""),
]


def cell(number, kind, text):
    made = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": text.splitlines(keepends=True)}
    return made if kind == "markdown" else {**made, "execution_count": None, "outputs": []}


notebook = {
    "cells": [cell(i, kind, text) for i, (kind, text) in enumerate(CELLS)],
    "metadata": {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    },
    "nbformat": 4,
    "nbformat_minor": 5,
}
out.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
