"""Which way a call of attention takes: a kernel, the materialized history, plain states."""

import copy
import json
import logging
import pickle
import re
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from kvq import KVQ, KVQCacheConfig
from kvq.attention.dispatch.kernel_cache import KernelCache
from kvq.attention.dispatch.kernel_registry import get_kernel_registry
from kvq.attention.entry import attend, attend_packed, kvq_attention_forward
from kvq.attention.hint import forget_hints
from kvq.attention.kernels.eager.kernel import REFERENCE
from kvq.attention.kernels.own_kernels import OWN_KERNELS
from kvq.attention.proving import benchmark_records
from kvq.attention.proving.benchmark_records import (
    device_class,
    find_benchmark_record,
    is_passing,
    load_benchmark_records,
)
from kvq.errors import ConfigError
from kvq.layers.quantized_layer import KVQLayer

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


class Eager(nn.Module):
    """A model's attention module, whose file has an eager attention of its own."""

    is_causal = True
    num_key_value_groups = 3


def eager_attention_forward(module, query, key, value, mask, **options):
    """What the module of the model offers; SDPA would drop what it obeys."""
    weights = torch.ones(*query.shape[:3], key.shape[2])
    return torch.full((query.shape[0], query.shape[2], query.shape[1], value.shape[3]), 7.0), weights


@pytest.fixture
def request_(make_request):
    return make_request()


@pytest.fixture
def scaling():
    return {"scaling": 0.1}


def read(request, **options):
    output, weights = attend(Eager(), request.query, request.pair, request.mask, **options)
    return output, weights, request.pair.kernel_cache.last_reader


def test_harmless_arguments_are_read_packed(request_, scaling, reference, error_of):
    options = dict(
        dropout=0.0, sliding_window=None, position_ids=torch.arange(1), use_cache=True, softcap=None, tokenizer=object()
    )
    output, weights, reader = read(request_, **scaling, **options)
    assert reader in ("compiled", "eager")
    assert weights is None
    assert error_of(output, reference(request_)) < 1e-5


@pytest.mark.parametrize(
    "options",
    [dict(output_attentions=True), dict(position_bias=torch.zeros(1, 6, 1, 334)), dict(head_mask=torch.ones(6))],
)
def test_what_no_kernel_knows_goes_to_the_models_own_attention(request_, scaling, options):
    output, weights, reader = read(request_, **scaling, **options)
    assert reader == f"materialized: argument {next(iter(options))!r}"
    assert output.eq(7).all()
    assert weights.shape == (2, 6, 1, 334)


def test_an_argument_of_the_future_is_not_ignored(request_, scaling):
    output, _, reader = read(request_, **scaling, sparsity=0.5)
    assert reader == "materialized: argument 'sparsity'"
    assert output.eq(7).all()


def test_dropout_materializes(request_, scaling):
    assert read(request_, **scaling, dropout=0.1)[2] == "materialized: dropout"


def test_gradients_flow_to_the_query(request_, scaling):
    query = request_.query.clone().requires_grad_()
    output, _ = attend(Eager(), query, request_.pair, None, **scaling)
    output.sum().backward()
    assert query.grad.ne(0).any()
    assert request_.pair.kernel_cache.last_reader == "materialized: gradients"


def test_softcap_and_sink_logits_reach_the_kernel(request_, scaling, reference, error_of):
    logits = torch.linspace(-2, 6, 6)
    output, _, reader = read(request_, **scaling, softcap=3.0, s_aux=logits)
    assert not reader.startswith("materialized")
    expected = copy.copy(request_)
    object.__setattr__(expected, "softcap", 3.0)
    object.__setattr__(expected, "sink_logits", logits)
    assert error_of(output, reference(expected)) < 1e-5
    assert error_of(output, reference(request_)) > 1e-2


def test_scaling_and_causality_have_the_defaults_of_sdpa(make_request, reference, error_of):
    request = make_request(queries=3)
    output, _, _ = read(request)
    plain = copy.copy(request)
    object.__setattr__(plain, "scaling", 32**-0.5)
    assert error_of(output, reference(plain)) < 1e-5
    object.__setattr__(plain, "is_causal", False)
    assert error_of(read(request, is_causal=False)[0], reference(plain)) < 1e-5


def test_a_first_forward_is_plain_sdpa(testing_backend):
    layer = KVQLayer(0, KVQCacheConfig(backend="testing").for_layer(0))
    keys, values = torch.randn(2, 1, 2, 9, 32)
    handles = layer.update(keys, values, packed=True)
    query = torch.randn(1, 6, 9, 32)
    output, _ = kvq_attention_forward(Eager(), query, *handles, None, scaling=0.1)
    expected = nn.functional.scaled_dot_product_attention(
        query, keys.repeat_interleave(3, 1), values.repeat_interleave(3, 1), scale=0.1, is_causal=True
    )
    torch.testing.assert_close(output, expected.transpose(1, 2))
    assert layer.kernel_cache.last_reader == "materialized: nothing is quantized yet"


class WrongKernel:
    """Forgets the sinks and the window."""

    name = "wrong"
    device_types = frozenset()
    needs_benchmark = False

    def __init__(self):
        self.calls = 0

    def why_unavailable(self):
        return None

    def why_unsupported(self, request):
        return None

    def attend(self, request):
        self.calls += 1
        return REFERENCE.attend(request) * 1.01


def test_a_kernel_that_disagrees_is_not_used_again(put_kernels, request_, reference, error_of):
    wrong = WrongKernel()
    registry = put_kernels(wrong, REFERENCE)
    kernel_cache = KernelCache()
    with pytest.warns(UserWarning, match=r"'wrong' on cpu differs from the reference by 1\.0e-02"):
        output = attend_packed(request_, kernel_cache)
    assert error_of(output, reference(request_)) < 1e-5
    assert attend_packed(request_, kernel_cache).equal(output)
    assert (wrong.calls, kernel_cache.last_reader) == (1, "eager")
    assert "differed from the reference" in registry.choose(request_).passed_over["wrong"]


class SharedMaskKernel(WrongKernel):
    """Right, but only for masks that all heads share."""

    name = "shared masks"

    def why_unsupported(self, request):
        return "a mask by head" if request.mask.dim() != 4 or request.mask.shape[1] != 1 else None

    def attend(self, request):
        assert self.why_unsupported(request) is None
        return REFERENCE.attend(request)


@pytest.mark.parametrize("shape", [(1, 6, 1, 334), (1, 334)])
def test_a_kernel_is_not_kept_for_a_mask_that_it_cannot_serve(put_kernels, make_request, shape):
    put_kernels(SharedMaskKernel(), REFERENCE)
    kernel_cache, readers = KernelCache(), []
    for one in ((1, 1, 1, 334), shape, (2, 1, 1, 334)):
        attend_packed(make_request(mask=torch.ones(one, dtype=torch.bool)), kernel_cache)
        readers.append(kernel_cache.last_reader)
    assert readers == ["shared masks", "eager", "shared masks"]


def test_a_kernel_without_a_record_is_no_default(put_kernels, request_, monkeypatch):
    unproven = WrongKernel()
    unproven.needs_benchmark = True
    registry = put_kernels(unproven, REFERENCE)
    choice = registry.choose(request_)
    assert choice.kernel is REFERENCE
    assert choice.passed_over["wrong"].startswith(f"no record proves it on {device_class(torch.device('cpu'))}")
    monkeypatch.setenv("KVQ_ATTENTION_KERNEL", "wrong")
    assert registry.choose(request_).kernel is unproven
    monkeypatch.setenv("KVQ_ATTENTION_KERNEL", "eager")
    assert registry.choose(request_).kernel is REFERENCE
    assert registry.choose(request_, wanted="wrong").kernel is unproven


def test_a_kernel_that_does_not_exist_is_refused(request_, monkeypatch):
    monkeypatch.setenv("KVQ_ATTENTION_KERNEL", "fastest")
    with pytest.raises(ConfigError, match=r"'fastest' is not a kernel; choose one of 'auto', 'compiled'") as error:
        get_kernel_registry().choose(request_)
    assert [fault.path for fault in error.value.faults] == [("KVQ_ATTENTION_KERNEL",)]
    assert "environment" in str(error.value)


def test_a_kernel_that_is_wanted_and_does_not_exist_is_refused(request_, monkeypatch):
    registry = get_kernel_registry()
    for name in ("nonsense", ""):
        with pytest.raises(ConfigError, match=re.escape(repr(name))) as error:
            registry.choose(request_, wanted=name)
        assert [fault.path for fault in error.value.faults] == [("wanted",)]
        assert "KVQ_ATTENTION_KERNEL" not in str(error.value)
    default = registry.choose(request_).kernel.name
    monkeypatch.setenv("KVQ_ATTENTION_KERNEL", "eager")
    assert registry.choose(request_).kernel.name == registry.choose(request_, wanted="eager").kernel.name == "eager"
    assert registry.choose(request_, wanted="auto").kernel.name == default


def test_every_kind_of_request_is_chosen_for(make_request):
    kinds = [make_request().kind(), make_request(queries=2).kind(), make_request(dtype=torch.bfloat16).kind()]
    kinds += [make_request(mask=torch.ones(1, 1, 1, 334)).kind(), make_request(tokens=9).kind()]
    assert len(set(kinds)) == 5


def test_the_table_says_what_the_records_say():
    for entry in load_benchmark_records():
        assert is_passing(entry)
        assert find_benchmark_record(entry["kernel"], entry["device_class"]) is entry
        record = json.loads((RESULTS / entry["record"]).read_text(encoding="utf-8"))
        measured = record.get("proof", record)
        assert {key: measured[key] for key in entry if key != "record"} == {
            k: v for k, v in entry.items() if k != "record"
        }


@pytest.mark.parametrize("kind", ["meta", "mps", "xpu"])
def test_a_device_of_another_type_is_a_class_of_its_own(kind):
    assert device_class(torch.device(kind)) == kind


def test_a_record_that_does_not_pass_proves_nothing():
    entry = {"relative_error": 5e-5, "speedup": 2.1}
    assert is_passing(entry)
    assert not is_passing({**entry, "speedup": 0.99})
    assert not is_passing({**entry, "relative_error": 2e-3})


def test_an_entry_of_the_table_saves_the_trial(monkeypatch):
    entry = {"kernel": "compiled", "device_class": "cpu-z80", "relative_error": 5e-5, "speedup": 2.1}
    monkeypatch.setattr(benchmark_records, "load_benchmark_records", lambda: ({**entry, "speedup": 0.5}, entry))
    assert find_benchmark_record("compiled", "cpu-z80") == entry
    assert find_benchmark_record("compiled", "cpu-z81") is None
    assert find_benchmark_record("triton", "cpu-z80") is None


def test_copies_of_a_layer_start_without_addresses(make_request, request_):
    layer = make_request.layer
    attend_packed(request_, layer.kernel_cache)
    assert layer.kernel_cache.choices
    for other in (copy.deepcopy(layer), layer.fork(), pickle.loads(pickle.dumps(layer.kernel_cache))):  # noqa: S301  # ours
        kernel_cache = other if isinstance(other, KernelCache) else other.kernel_cache
        assert (kernel_cache.choices, kernel_cache.kernel_data, kernel_cache.last_reader) == ({}, {}, "")
    layer.reset()
    assert layer.kernel_cache.kernel_data == {}


@pytest.mark.parametrize("change", [lambda layer: layer.crop(-250), lambda layer: layer.batch_repeat_interleave(2)])
def test_no_kernel_keeps_chunks_alive_that_the_layer_has_left(make_request, request_, change):
    attend_packed(request_, request_.pair.kernel_cache)
    layer = make_request.layer
    layer.kernel_cache.kernel_data["a kernel"] = layer.side("key").view().store.segments
    change(layer)
    assert layer.kernel_cache.kernel_data == {}


def test_a_plan_follows_the_store(make_request, error_of, reference):
    """Across flushes, crops and reordering the compiled kernel reads the chunks of the moment."""
    kernel = next(kernel for kernel in OWN_KERNELS if kernel.name == "compiled")
    if (problem := kernel.why_unavailable()) is not None:
        pytest.skip(problem)
    request = make_request(sink_length=3)
    layer = make_request.layer
    changes = [lambda: layer.crop(-200), lambda: layer.reorder_cache(torch.tensor([1, 0])), lambda: None]
    for change in changes:
        change()
        for count in (1, 1, 80, 1):
            states = torch.randn(2, 2, 2, count, 32)
            handle, _ = layer.update(*states, packed=True)
            step = type(request)(request.query, handle.pair, None, 0.1)
            assert error_of(kernel.attend(step), reference(step)) < 1e-5


@pytest.fixture
def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="kvq").eval()


def test_the_name_is_known_at_load_and_shows_in_the_report(llama):
    cache = KVQ(model=llama, nbits_k=4, nbits_v=4)
    with torch.inference_mode():
        llama(torch.arange(90)[None], past_key_values=cache)
        assert {layer.attention for layer in cache.memory().layers} == {"materialized: nothing is quantized yet"}
        llama(torch.arange(90)[None], past_key_values=cache)
        llama(torch.arange(3)[None], past_key_values=cache)
        llama(torch.arange(1)[None], past_key_values=cache)
    expected = "compiled" if "compiled" not in choose_any(cache).passed_over else "eager"
    assert {layer.attention for layer in cache.memory().layers} == {expected}
    assert cache.memory().attention == (expected,)


def choose_any(cache):
    return next(iter(cache.layers[0].kernel_cache.choices.values()))


def test_another_attention_gets_one_hint(llama, caplog):
    forget_hints()
    llama.set_attn_implementation("sdpa")
    with caplog.at_level(logging.WARNING, logger="kvq"), torch.inference_mode():
        cache = KVQ(model=llama)
        llama(torch.arange(5)[None], past_key_values=cache)
        llama(torch.arange(1)[None], past_key_values=cache)
    assert [record.message for record in caplog.records if "attn_implementation='sdpa'" in record.message] == [
        "a KVQ cache under attn_implementation='sdpa' is dequantized as a whole at every step; "
        "model.set_attn_implementation('kvq') reads it packed, which is faster and needs no copy"
    ]
    llama.set_attn_implementation("kvq")
    caplog.clear()
    llama(torch.arange(1)[None], past_key_values=cache)
    assert not caplog.records
