"""An evaluation of the published kind: pair by pair, with the base model and with a merged one.

Special tokens do not count. Writes each pair's cosine before and after training:
``evaluate_pairs.py MODEL ADAPTER_FOLDER PAIRS.csv OUT.csv``.
"""

import csv
import sys
import time
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

LAYER = 2
device = "cuda" if torch.cuda.is_available() else "cpu"
model_name, adapter_folder, pairs_file, out_file = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model_name)


def load() -> Any:
    return AutoModelForCausalLM.from_pretrained(model_name, device_map={"": device})


base = load().eval()
merged = PeftModel.from_pretrained(load(), adapter_folder).merge_and_unload().eval()


@torch.no_grad()
def embedding(model: Any, word: str) -> torch.Tensor:
    tokens = tokenizer(word, return_tensors="pt").to(device)
    hidden = model(**tokens, output_hidden_states=True).hidden_states[LAYER][0]
    special = torch.tensor(tokenizer.all_special_ids, device=device)
    return hidden[~torch.isin(tokens["input_ids"][0], special)].float().mean(0)


def similarity(model: Any, pair: tuple[str, str]) -> float:
    a, b = (embedding(model, word) for word in pair)
    return torch.cosine_similarity(a, b, dim=0).item()


with open(pairs_file, newline="") as file:
    pairs = [(a, b) for a, b in csv.reader(file)]
start = time.perf_counter()
rows = [(*pair, similarity(base, pair), similarity(merged, pair)) for pair in pairs]
print(f"evaluated in {time.perf_counter() - start:.3f} s")
with open(out_file, "w", newline="") as file:
    csv.writer(file).writerows([("source", "target", "before", "after"), *rows])
