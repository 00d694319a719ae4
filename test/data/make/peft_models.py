"""The tiny models of goldens/peft, for make_peft_goldens.py and for PEFT's judgement of exported adapters (test/support/peft-oracle.py)."""
import torch
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM


def bert():
    return BertForSequenceClassification(BertConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80, vocab_size=96, max_position_embeddings=32, num_labels=3))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=96, n_positions=32))


def llama():
    return LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96, vocab_size=96, max_position_embeddings=32, tie_word_embeddings=False))


class Convs(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.mix = torch.nn.Conv2d(6, 10, 3, padding=1), torch.nn.Conv2d(10, 12, 1)
        self.seq, self.head = torch.nn.Conv1d(12, 8, 5), torch.nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.seq(self.mix(self.down(x)).flatten(2)).mean(-1))
