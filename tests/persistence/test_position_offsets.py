"""Files of caches beside which the model keeps offsets of images: Qwen2-VL."""

import json

import pytest
import torch
import transformers
from safetensors import safe_open

from kvq import KVQ, attach

EXACT = dict(residual_length=2048)
GREEDY = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
IMAGE = 98


@pytest.fixture
def model():
    torch.manual_seed(3)
    config = transformers.Qwen2VLConfig(
        text_config=dict(
            vocab_size=99, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1,
            eos_token_id=None, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        ),
        vision_config=dict(depth=1, embed_dim=32, hidden_size=64, num_heads=2, patch_size=4, mlp_ratio=2),
        image_token_id=IMAGE, vision_start_token_id=97, vision_end_token_id=96,
    )  # fmt: skip
    model = transformers.Qwen2VLForConditionalGeneration(config).eval()
    for parameter in model.model.language_model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def inputs(rows=2):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 95, (rows, 60), generator=generator)
    ids[:, 10], ids[:, 11:27], ids[:, 27] = 97, IMAGE, 96  # 8 x 8 patches, four of which make a token
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(rows * 64, 3 * 2 * 4 * 4, generator=generator),
        "image_grid_thw": torch.tensor([[1, 8, 8]] * rows),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


def read_all_but_the_last(model, cache):
    given = inputs()
    cut = {name: given[name][:, :-1] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    with torch.no_grad():
        model(**{**given, **cut}, past_key_values=cache, use_cache=True)


def go_on(model, cache):
    given = inputs()
    text = {name: given[name] for name in ("input_ids", "attention_mask")}
    return model.generate(**text, past_key_values=cache, **GREEDY)


@pytest.mark.case("Qwen2-VL: a saved cache, loaded in another process", "the model gets its `rope_deltas` back")
def test_a_loaded_cache_brings_the_offsets_of_its_images(model, tmp_path):
    reference = model.generate(**inputs(), **GREEDY)
    assert len(set(reference[0, 60:].tolist())) >= 8
    cache, path = KVQ(EXACT, model=model), tmp_path / "cache.safetensors"
    read_all_but_the_last(model, cache)
    offsets = model.model.rope_deltas
    assert int(offsets[0]) == 4 - 16
    model.generate(torch.full((1, 5), 7), max_new_tokens=2, do_sample=False, pad_token_id=0)  # has none of its own
    assert not torch.equal(model.model.rope_deltas, offsets)
    cache.save(path)
    model.model.rope_deltas = None  # as in another process
    loaded = KVQ.load(path, model=model)
    assert torch.equal(model.model.rope_deltas, offsets)
    assert torch.equal(go_on(model, loaded), reference)


def test_without_them_the_text_is_another(model):
    reference = model.generate(**inputs(), **GREEDY)
    cache = KVQ(EXACT, model=model)
    read_all_but_the_last(model, cache)
    model.model.rope_deltas = torch.zeros_like(model.model.rope_deltas)
    assert not torch.equal(go_on(model, cache), reference), "the test above would prove nothing"


def test_a_snapshot_brings_them_back(model):
    reference = model.generate(**inputs(), **GREEDY)
    cache = KVQ(EXACT, model=model)
    read_all_but_the_last(model, cache)
    snapshot = cache.snapshot()
    model.generate(torch.full((1, 5), 7), max_new_tokens=2, do_sample=False, pad_token_id=0)
    cache.restore(snapshot)
    assert torch.equal(go_on(model, cache), reference)


def test_they_go_with_the_rows_of_the_batch(model, tmp_path):
    path, cache = tmp_path / "cache.safetensors", KVQ(EXACT, model=model)
    read_all_but_the_last(model, cache)
    model.model.rope_deltas = torch.tensor([[-12], [-5]])
    cache.get_mask_sizes(1, 0)  # as the next forward does
    for change, expected in (
        (lambda: cache.reorder_cache(torch.tensor([1, 0])), [[-5], [-12]]),
        (lambda: cache.batch_repeat_interleave(2), [[-5], [-5], [-12], [-12]]),
        (lambda: cache.batch_select_indices(torch.tensor([3])), [[-12]]),
        (lambda: cache.batch_repeat_interleave(2), [[-12]]),
    ):
        change()
        cache.save(path)
        KVQ.load(path, model=model)
        assert model.model.rope_deltas.tolist() == expected


def test_an_attached_cache_knows_them(model, tmp_path):
    with attach(model, EXACT) as attachment:
        model.generate(**inputs(), **GREEDY)
    attachment.cache.save(tmp_path / "cache.safetensors")
    with safe_open(tmp_path / "cache.safetensors", "pt") as file:
        assert file.get_tensor("position_offsets").tolist() == [[-12], [-12]]
        assert file.metadata()["format_version"] == "4"


def test_a_file_that_does_not_know_them_is_told(model, tmp_path):
    cache, path = KVQ(EXACT), tmp_path / "cache.safetensors"
    read_all_but_the_last(model, cache)
    cache.save(path, model=model)
    with safe_open(path, "pt") as file:
        assert "position_offsets" not in json.loads(file.metadata()["cache"])
    with pytest.warns(UserWarning, match="which rope_deltas the model had"):
        KVQ.load(path, model=model)
