"""Trains a classifier within the components of a pack, with PEFT and transformers' Trainer, on one GPU or many.

usage: python train.py MODEL COMPONENTS.safetensors ROWS.jsonl OUT [STEPS]
MODEL: the pack's base, a folder or a name on the Hub. ROWS: {"text": "…", "label": "…"} on each line. OUT: the adapter's folder.
Several GPUs: torchrun --nproc_per_node 4 train.py …
"""
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments, set_seed

from components import groups, inside


class FiniteTrainer(Trainer):
    """Stops at a loss that is not finite, before anything is saved. Trainer itself would leave such a loss out of its log and go on."""

    def training_step(self, *given, **named):
        loss = super().training_step(*given, **named)
        if not loss.isfinite():
            raise FloatingPointError(f"step {self.state.global_step + 1}: expected a finite loss, found {loss.item()}; nothing is saved. Load the base with dtype=torch.float32, or lower the rate")
        return loss


def fit(tuned, data, collate, out, rate=0.04, labels=None, **how):
    """Trains with AdamW, the rate falling to 0, and saves the adapter. One process of several writes."""
    args = TrainingArguments(out, logging_steps=20, save_strategy="no", report_to="none", **how)
    optimizer = torch.optim.AdamW(groups(tuned, rate), weight_decay=0.0)
    trainer = FiniteTrainer(tuned, args, train_dataset=data, data_collator=collate, optimizers=(optimizer, None))
    trainer.train()
    if wrong := [name for name, value in tuned.named_parameters() if value.requires_grad and not value.isfinite().all()]:
        raise FloatingPointError(f"{wrong[0]}: expected finite values after the last step; nothing is saved. Lower the rate")
    if trainer.is_world_process_zero():
        tuned.save_pretrained(out)
        if labels:
            Path(out, "task.json").write_text(json.dumps({"labels": labels}))


def train(model, components, rows, out, steps=240, batch=32, seed=0):
    set_seed(seed)
    lines = [json.loads(line) for line in Path(rows).read_text().splitlines()]
    labels = sorted({line["label"] for line in lines})
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=len(labels), dtype=torch.float32)
    tuned = inside(base, components, "SEQ_CLS")
    tuned.print_trainable_parameters()
    tokens = tokenizer([line["text"] for line in lines], truncation=True, max_length=128)["input_ids"]
    data = [{"input_ids": ids, "labels": labels.index(line["label"])} for ids, line in zip(tokens, lines)]
    how = dict(max_steps=steps, per_device_train_batch_size=batch, seed=seed)
    fit(tuned, data, DataCollatorWithPadding(tokenizer), out, labels=labels, **how)
    return tuned


if __name__ == "__main__":
    train(*sys.argv[1:5], *map(int, sys.argv[5:]))
