"""A prompt that is prefilled once goes on to the same tokens in another process."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from kvq import KVQ
from kvq.evaluation.recall import sample_recall_batch

GOING_ON = """
import json, sys
from kvq import KVQ
from kvq.evaluation.embedded_model import load_embedded_model
model, _ = load_embedded_model()
cache = KVQ.load(sys.argv[1], model=model)
held = cache.get_seq_length()
fork = cache.fork()
texts = [
    model.generate(one.token_ids, past_key_values=one, max_new_tokens=60, do_sample=False)[0].tolist()
    for one in (cache, fork)
]
assert cache.layers[0].side("key").store.length > held - 192, "nothing was quantized on the way"
print(json.dumps(texts))
"""


@pytest.mark.costly
def test_the_same_tokens(recall_model, tmp_path):
    batch = sample_recall_batch(1, 60, 1, generator=torch.Generator().manual_seed(4))
    token_ids = torch.tensor([[*batch.context[0].tolist(), *batch.questions[0, 0, :2].tolist()]])
    cache = KVQ(model=recall_model)
    with torch.inference_mode():
        recall_model(token_ids[:, :-1], past_key_values=cache)
    cache.save(tmp_path / "prompt.safetensors", token_ids=token_ids)
    expected = recall_model.generate(token_ids, past_key_values=cache, max_new_tokens=60, do_sample=False)[0].tolist()
    assert len(set(expected[token_ids.shape[1] :])) >= 8
    command = [sys.executable, "-c", GOING_ON, str(tmp_path / "prompt.safetensors")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [expected, expected]
