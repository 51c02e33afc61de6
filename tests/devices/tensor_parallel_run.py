"""Run by torchrun: generates with a model that is split over the processes, and writes what this rank got and holds."""

import json
import os
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from kvq import KVQ
from kvq.evaluation.embedded_model import EMBEDDED_MODEL_PATH
from kvq.evaluation.recall import sample_recall_batch

torch.set_num_threads(1)
plan = {"tp_plan": "auto"} if sys.argv[1] == "split" else {}
model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL_PATH, dtype=torch.float32, **plan).eval()
token_ids = sample_recall_batch(2, 38, 1, generator=torch.Generator().manual_seed(0)).context
cache = KVQ(model=model, residual_length=32)
output = model.generate(
    token_ids, attention_mask=torch.ones_like(token_ids), past_key_values=cache, max_new_tokens=40, do_sample=False
)
side = cache.layers[0].side("key")
folder, rank = Path(sys.argv[2]), os.environ.get("RANK", "0")
path = folder / f"rank{rank}.safetensors"
cache.save(path, model=model)
result = {
    "tokens": output[:, token_ids.shape[1] :].tolist(),
    "bytes": cache.memory().total_bytes - cache.memory().constant_bytes,  # each process has all signs of the rotation
    "packed": cache.memory().packed_bytes,
    "heads": side.store.num_heads,
    "stored": side.store.length,
    "loaded": KVQ.load(path, model=model).memory().packed_bytes,
}
(folder / f"rank{rank}.json").write_text(json.dumps(result), encoding="utf-8")
