"""A model whose layers accelerate keeps in several places: the cache follows the states of each."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvq import KVQ
from kvq.evaluation.embedded_model import EMBEDDED_MODEL_PATH, load_embedded_model
from kvq.evaluation.recall import sample_recall_batch
from kvq.persistence.fingerprint import fingerprint_model

pytest.importorskip("accelerate")


def test_layers_on_disk(tmp_path):
    whole, _ = load_embedded_model()
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    spread = AutoModelForCausalLM.from_pretrained(
        EMBEDDED_MODEL_PATH, dtype=torch.bfloat16, device_map=places, offload_folder=tmp_path / "weights"
    ).eval()
    assert spread.model.layers[2].self_attn.k_proj.weight.is_meta, "nothing is on disk, so that nothing is shown"
    batch = sample_recall_batch(1, 60, 1, generator=torch.Generator().manual_seed(4))
    token_ids = torch.tensor([[*batch.context[0].tolist(), *batch.questions[0, 0, :2].tolist()]])
    texts = []
    for model in (whole, spread):
        cache = KVQ(model=model, residual_length=32)
        options = {"attention_mask": torch.ones_like(token_ids), "max_new_tokens": 60, "do_sample": False}
        texts.append(model.generate(token_ids, past_key_values=cache, **options)[0, token_ids.shape[1] :].tolist())
    assert len(set(texts[0])) >= 8
    assert texts[0] == texts[1]
    assert cache.layers[0].side("key").store.length > 0
    assert fingerprint_model(spread) == fingerprint_model(whole)
    cache.save(tmp_path / "cache.safetensors")
    assert KVQ.load(tmp_path / "cache.safetensors", model=whole).layers[2].device == cache.layers[2].device
