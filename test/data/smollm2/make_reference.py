#!/usr/bin/env python3
"""PEFT's greedy answers of SmolLM2-135M-Instruct with each adapter, in f32: reference.json.

    OMP_NUM_THREADS=1 python make_reference.py SMOLLM2 OUT.json FOLDER...

SMOLLM2 was made by test/tools/smollm2.py; a FOLDER holds adapters of PEFT, each named as its task in tasks/. Rows of one length go
together, so nothing is padded. Per task: `prompts`, token ids of "PROMPT: INPUT →" of all test rows. Per adapter, under the last two
parts of its path: `answers`, what PEFT generates for each, up to and with <|im_end|> or 14 tokens; `top`, the five largest logits of
the first token of eight rows; `right`, the rows whose answer has the reference's text.
"""
import json
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

END, MOST, TOP_ROWS = 2, 14, 8
HERE = os.path.dirname(os.path.abspath(__file__))


@torch.no_grad()
def generate(model, prompts):
    """Answers, and the logits of their first tokens."""
    answers, firsts = [None] * len(prompts), [None] * len(prompts)
    for length in sorted({len(prompt) for prompt in prompts}):
        rows = [row for row, prompt in enumerate(prompts) if len(prompt) == length]
        ids, past, found = torch.tensor([prompts[row] for row in rows]), None, []
        for step in range(MOST):
            out = model(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)
            past, logits = out.past_key_values, out.logits[:, -1]
            ids = logits.argmax(-1, keepdim=True)
            found.append(ids[:, 0].tolist())
            if step == 0:
                for row, one in zip(rows, logits):
                    firsts[row] = one
            if all(END in tokens for tokens in zip(*found)):
                break
        for row, tokens in zip(rows, zip(*found)):
            answers[row] = list(tokens[:tokens.index(END) + 1] if END in tokens else tokens)
    return answers, firsts


def main():
    smollm2, out, *folders = sys.argv[1:]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
    reference = {"tasks": {}, "adapters": {}}
    for folder in folders:
        for name in sorted(os.listdir(folder)):
            with open(f"{HERE}/tasks/{name}.json", encoding="utf-8") as file:
                task = json.load(file)
            prompts = [encode(f"{task['prompt']}: {given} →") for given, _ in task["test"]]
            reference["tasks"][name] = {"prompts": prompts}
            # A fresh model each time: nothing of an adapter stays.
            base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
            model = PeftModel.from_pretrained(base, f"{folder}/{name}").eval()
            answers, firsts = generate(model, prompts)
            text = lambda ids: tokenizer.decode(ids[:-1]) if ids[-1] == END else None
            right = [row for row, ids in enumerate(answers) if text(ids) == f" {task['test'][row][1]}"]
            top = [{"ids": one.topk(5).indices.tolist(), "logits": [round(x, 4) for x in one.topk(5).values.tolist()]} for one in firsts[:TOP_ROWS]]
            reference["adapters"][f"{os.path.basename(os.path.abspath(folder))}/{name}"] = {"answers": answers, "right": right, "top": top}
            print(f"{folder}/{name}: {len(right)} of {len(answers)} right", flush=True)
    lines = lambda part: ",\n".join(f"{json.dumps(name)}:{json.dumps(value, separators=(',', ':'))}" for name, value in part.items())
    with open(out, "w", encoding="utf-8") as file:
        file.write(f'{{"tasks":{{\n{lines(reference["tasks"])}\n}},\n"adapters":{{\n{lines(reference["adapters"])}\n}}}}\n')


main()
