"""A layer scan of the published kind: the model is called on one word at a time, anew for every layer.

Writes the mean cosine of every layer's translations: ``scan_layers.py MODEL PAIRS.csv OUT.csv``.
"""

import csv
import sys
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

device = "cuda" if torch.cuda.is_available() else "cpu"
model_name, pairs_file, out_file = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model_name)
model = AutoModelForCausalLM.from_pretrained(model_name, device_map={"": device})
model.eval()


def embedding(word: str, layer: int) -> torch.Tensor:
    tokens = tokenizer(word, return_tensors="pt", padding=True).to(device)
    with torch.no_grad():
        outputs = model(**tokens, output_hidden_states=True)
    hidden = outputs.hidden_states[layer]
    mask = tokens["attention_mask"].unsqueeze(-1).expand(hidden.size()).float()
    return ((hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9))[0]


with open(pairs_file, newline="") as file:
    pairs = [tuple(row) for row in csv.reader(file)]
start = time.perf_counter()
rows = []
for layer in range(model.config.num_hidden_layers + 1):
    similarities = [
        torch.cosine_similarity(embedding(a, layer), embedding(b, layer), dim=0).item()
        for a, b in pairs
    ]
    rows.append((layer, sum(similarities) / len(similarities)))
print(f"scanned in {time.perf_counter() - start:.3f} s")
with open(out_file, "w", newline="") as file:
    csv.writer(file).writerows([("layer", "cosine"), *rows])
