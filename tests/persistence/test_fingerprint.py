"""Which weights tell a model from others, in each family."""

from __future__ import annotations

import pytest
import torch
import transformers

from kvq.persistence.fingerprint import fingerprint_model
from kvq.transformers_seams.key_projections import find_key_projections, find_layer_devices

SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
FAMILIES = {
    "Llama": (SIZES, "self_attn.k_proj"),
    "Qwen3": (SIZES, "self_attn.k_proj"),
    "Gemma2": ({**SIZES, "num_key_value_heads": 1}, "self_attn.k_proj"),
    "Phi3": ({**SIZES, "pad_token_id": 0}, "self_attn.qkv_proj"),
    "GPT2": ({"vocab_size": 50, "n_embd": 32, "n_layer": 3, "n_head": 2}, "attn.c_attn"),
    "GPTNeoX": (SIZES, "attention.query_key_value"),
    "OPT": (
        {"vocab_size": 50, "hidden_size": 32, "ffn_dim": 32, "num_hidden_layers": 3, "num_attention_heads": 2},
        "self_attn.k_proj",
    ),
    "Falcon": (
        {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2},
        "self_attention.query_key_value",
    ),
    "Bloom": ({"vocab_size": 50, "hidden_size": 32, "n_layer": 3, "n_head": 2}, "self_attention.query_key_value"),
    "DeepseekV3": (
        {**SIZES, "num_key_value_heads": 2, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8,
         "qk_nope_head_dim": 8, "v_head_dim": 8, "moe_intermediate_size": 8, "first_k_dense_replace": 3},
        "self_attn.kv_a_proj_with_mqa",
    ),
}  # fmt: skip


def build(family):
    torch.manual_seed(0)
    fields, name = FAMILIES[family]
    config = getattr(transformers, f"{family}Config")(**fields)
    return transformers.AutoModelForCausalLM.from_config(config), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.case(
    "a saved cache under other weights of the same architecture",
    "its fingerprint, of the first and the last key projection, differs",
    report="antirez/ds4#805",
)
def test_the_first_and_the_last_key_projection(family):
    model, name = build(family)
    found = [path for path, _ in find_key_projections(model)]
    assert len(found) == 3
    assert all(path.endswith(f".{index}.{name}") for index, path in enumerate(found))
    before = fingerprint_model(model)
    assert [sample.name for sample in before.weights] == [found[0], found[-1]]
    with torch.no_grad():
        model.get_submodule(found[-1]).weight[-1] += 1
    after = fingerprint_model(model)
    assert before.weights[0] == after.weights[0]
    assert before.weights[1] != after.weights[1]
    assert find_layer_devices(model, 3) == [torch.device("cpu")] * 3


def test_a_model_of_unknown_names_is_told_by_all_its_layers():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.ModuleDict({"mix": torch.nn.Linear(4, 4)}) for _ in range(2))

    assert [name for name, _ in find_key_projections(Odd())] == ["layers.0.mix", "layers.1.mix"]


def test_weights_that_are_nowhere_leave_the_configuration():
    with torch.device("meta"):
        model, _ = build("Llama")
    assert fingerprint_model(model).weights == []
    assert fingerprint_model(model).facts == fingerprint_model(model.config).facts
    assert fingerprint_model(model).facts["hidden_size"] == 32
