"""Trains a skill of a language model within the components of a pack, with PEFT and transformers' Trainer, on one GPU or many.

usage: python train_llm.py MODEL COMPONENTS.safetensors ROWS.jsonl OUT [STEPS]
MODEL: the pack's base, a folder or a name on the Hub. ROWS: {"prompt": "…", "completion": "…"} on each line; completions alone are learned.
"""
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, set_seed

from components import inside
from train import fit


def train(model, components, rows, out, steps=80, batch=16, seed=0):
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    data = []
    for line in Path(rows).read_text().splitlines():
        row = json.loads(line)
        asked, said = (tokenizer(row[part], add_special_tokens=False)["input_ids"] for part in ("prompt", "completion"))
        said = [*said, tokenizer.eos_token_id]
        data.append({"input_ids": asked + said, "labels": [-100] * len(asked) + said})
    tuned = inside(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), components, "CAUSAL_LM", rank=4)
    tuned.print_trainable_parameters()
    fit(tuned, data, DataCollatorForSeq2Seq(tokenizer), out, 0.02, max_steps=steps, per_device_train_batch_size=batch, seed=seed)
    return tuned


if __name__ == "__main__":
    train(*sys.argv[1:5], *map(int, sys.argv[5:]))
