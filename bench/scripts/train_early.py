"""Training of the published kind: adapters on every block, a loss at ``hidden_states[2]``.

Each step calls the whole model on two padded batches. Writes the losses and the adapter:
``train_early.py MODEL PAIRS.csv OUT.csv ADAPTER_FOLDER EPOCHS``.
"""

import csv
import random
import sys
import time

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    get_linear_schedule_with_warmup,
    set_seed,
)

LAYER, BATCH, MARGIN = 2, 8, 0.4
device = "cuda" if torch.cuda.is_available() else "cpu"
model_name, pairs_file, out_file, adapter_folder, epochs = sys.argv[1:]
set_seed(0)
tokenizer = AutoTokenizer.from_pretrained(model_name)
model = AutoModelForCausalLM.from_pretrained(model_name, device_map={"": device})
model = get_peft_model(
    model,
    LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=0.0,
        target_modules=["q_proj", "v_proj"],
        task_type=TaskType.CAUSAL_LM,
    ),
)
model.train()


def embeddings(words: list[str]) -> torch.Tensor:
    tokens = tokenizer(words, return_tensors="pt", padding=True).to(device)
    outputs = model(**tokens, output_hidden_states=True)
    hidden = outputs.hidden_states[LAYER]
    mask = tokens["attention_mask"].unsqueeze(-1).expand(hidden.size()).float()
    pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
    return torch.nn.functional.normalize(pooled, dim=-1)


def step(batch: list[tuple[str, str]]) -> float:
    anchors, positives = (embeddings(list(side)) for side in zip(*batch, strict=True))
    similarities = anchors @ positives.T
    others = similarities.masked_fill(torch.eye(len(batch), device=device).bool(), -2)
    loss = torch.relu(MARGIN + others.max(1).values - similarities.diagonal()).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    return loss.item()


with open(pairs_file, newline="") as file:
    pairs = [tuple(row) for row in csv.reader(file)]
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
steps = int(epochs) * (len(pairs) // BATCH)
schedule = get_linear_schedule_with_warmup(optimizer, min(50, steps // 4), steps)
losses = []
start = time.perf_counter()
for _ in range(int(epochs)):
    random.shuffle(pairs)
    for first in range(0, len(pairs) - BATCH + 1, BATCH):
        losses.append(step(pairs[first : first + BATCH]))
print(f"trained in {time.perf_counter() - start:.3f} s")
model.save_pretrained(adapter_folder)
with open(out_file, "w", newline="") as file:
    csv.writer(file).writerows([("step", "loss"), *enumerate(losses)])
