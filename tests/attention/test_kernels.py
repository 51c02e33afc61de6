"""Every kernel against dequantize-then-attend in fp64."""

import pytest
import torch
from largest_tensor import LargestTensor
from torch.nn import functional

from kvq.attention.dispatch.kernel_cache import KernelCache
from kvq.attention.dispatch.kernel_registry import get_kernel_registry
from kvq.attention.entry import attend_packed
from kvq.attention.kernels.blockwise import BlockwiseKernel
from kvq.attention.kernels.own_kernels import OWN_KERNELS
from kvq.config import KVQCacheConfig

FP32_ERROR = 1e-5
"""Of kernels that compute in fp32 throughout."""
ROUNDED_ERROR = 1e-4
"""Of the compiled kernel, which rounds the query and the weights to 16 bits where the scores are not sharp; most of the
cases below stay under the other bound even so. See test_whole_numbers.py."""

PADDED = torch.ones(2, 1, 1, 334, dtype=torch.bool)
PADDED[0, ..., :41] = False

DEFAULTS = {
    name: KVQCacheConfig.model_fields[name].default
    for name in ("axis_value", "rotation_k", "rotation_v", "balance_k", "balance_v", "residual_length")
}
CASES = {
    "odd length": dict(tokens=301),
    "defaults": {**DEFAULTS, "nbits_v": 2, "q_group_size": 64, "sink_length": 4},
    "window only": dict(tokens=63, residual_length=64),
    "nothing but the new token": dict(tokens=0),
    "no window": dict(tokens=320, residual_length=0),
    "sinks": dict(sink_length=4),
    "sinks only": dict(tokens=160, sink_length=160, residual_length=0),
    "sinks behind padding": dict(sink_length=5, padding=(41, 0), mask=PADDED),
    "sinks across a block": dict(sink_length=40, padding=(30, 3)),
    "some of the sinks stored": dict(tokens=100, sink_length=40),
    "some of the sinks forgotten": dict(sink_length=5, padding=(30, 3), forgotten=32),
    "the sinks of one row forgotten": dict(sink_length=5, padding=(41, 0), forgotten=32, mask=PADDED[..., 32:]),
    "all sinks forgotten": dict(sink_length=5, forgotten=32),
    "padding up to the last stored tokens": dict(tokens=100, sink_length=4, padding=(30, 31)),
    "one query head per head": dict(sharing=1),
    "seven query heads per head": dict(sharing=7, heads=1),
    "head dim 67": dict(head_dim=67),
    "head dim 8": dict(head_dim=8, q_group_size=8, nbits_k=2, nbits_v=2, metadata_dtype="float16"),
    "head dim 80 in groups of 40": dict(head_dim=80, q_group_size=64),
    "head dims differ": dict(head_dim=48, value_dim=72),
    "rotated": dict(rotation_k="hadamard", rotation_v="hadamard", sink_length=2),
    "rotated in blocks of 16": dict(rotation_k="hadamard", rotation_v="hadamard", head_dim=48),
    "balanced": dict(axis_value="per_channel", balance_k="rms", balance_v="rms", octaves=6.0, sink_length=2),
    "balanced and rotated": dict(
        axis_value="per_channel",
        balance_k="rms",
        balance_v="rms",
        rotation_k="hadamard",
        rotation_v="hadamard",
        octaves=6.0,
        nbits_k=3,
        queries=2,
    ),
    "keys balanced": dict(balance_k="rms", octaves=6.0),
    "values balanced": dict(axis_key="per_token", axis_value="per_channel", balance_v="rms", octaves=6.0, nbits_v=4),
    "rows reordered": dict(rows=[1, 0], sink_length=3),
    "a row twice": dict(rows=[1, 1]),
    "boolean mask": dict(mask=PADDED),
    "additive mask by head": dict(mask=torch.linspace(-3, 3, 6 * 334).reshape(1, 6, 1, 334)),
    "softcap": dict(softcap=3.0),
    "sink logits": dict(sink_logits=torch.linspace(-2, 6, 6)),
    "three queries": dict(queries=3),
    "three queries that see everything": dict(queries=3, is_causal=False),
    "three queries, masked": dict(queries=3, mask=torch.ones(3, 336, dtype=torch.bool).tril(333)[None, None]),
    "huge": dict(magnitude=1e20),
    "tiny": dict(magnitude=1e-20),
    "float32 metadata": dict(metadata_dtype="float32"),
    "metadata in bytes": dict(metadata_dtype="int8"),
    "metadata in bytes, the other way round": dict(
        metadata_dtype="int8", axis_key="per_token", axis_value="per_channel", balance_v="rms", octaves=6.0, nbits_k=3
    ),
    "metadata in bytes, huge": dict(metadata_dtype="int8", magnitude=1e20),
}


@pytest.mark.parametrize("case", CASES)
def test_it_equals_dequantize_then_attend(kernel, make_request, reference, error_of, case):
    request = make_request(**CASES[case])
    assert kernel.why_unsupported(request) is None
    assert error_of(kernel.attend(request), reference(request)) < FP32_ERROR


@pytest.mark.parametrize("axes", [("per_channel", "per_token"), ("per_token", "per_channel")])
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_and_granularity(kernel, make_request, reference, error_of, bits, axes):
    request = make_request(nbits_k=bits, nbits_v=bits, axis_key=axes[0], axis_value=axes[1], head_dim=64)
    assert request.pair.key.store.length >= 256
    bound = ROUNDED_ERROR if kernel.name == "compiled" else FP32_ERROR
    assert error_of(kernel.attend(request), reference(request)) < bound


def test_one_bit_less_or_a_swapped_group_is_noticed(kernel, make_request, reference, error_of):
    request = make_request(nbits_v=4)
    expected = reference(request)
    part = request.pair.value.store.segments[0].parts["codes_4"]
    part[0, 0, 0, 0, 0] ^= 128
    assert error_of(kernel.attend(request), expected) > 3 * FP32_ERROR
    part[0, 0, 0, 0, 0] ^= 128
    assert error_of(kernel.attend(request), expected) < FP32_ERROR
    scale = request.pair.key.store.segments[0].parts["scale"]
    scale.copy_(scale.flip(-1))
    assert error_of(kernel.attend(request), expected) > 3 * FP32_ERROR


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_error_is_that_of_sdpa(kernel, make_request, error_of, dtype):
    """No more than the error of SDPA on the dequantized states, both against fp64 on the same states."""
    ours, theirs = [], []
    for tokens in (300, 700, 1100):
        request = make_request(tokens=tokens, dtype=dtype, head_dim=64, sharing=4)
        keys, values = request.pair.key.materialize(), request.pair.value.materialize()
        query = request.query.reshape(2, 2, 4, 64)
        exact = functional.scaled_dot_product_attention(query.double(), keys.double(), values.double(), scale=0.1)
        sdpa = functional.scaled_dot_product_attention(query, keys, values, scale=0.1)
        theirs.append(error_of(sdpa, exact))
        output = kernel.attend(request)
        assert output.dtype == dtype
        ours.append(error_of(output.reshape(2, 2, 4, 64), exact))
    assert sum(ours) <= 1.05 * sum(theirs)


F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
MIXED = [(F32, F32, BF16), (F32, BF16, F32), (F32, F16, BF16), (BF16, F32, BF16), (BF16, BF16, F32), (F16, F32, F16)]
ROUNDED = {F32: FP32_ERROR, F16: 1e-3, BF16: 8e-3}
"""The output is rounded once, to the dtype of the query."""


@pytest.mark.case("bfloat16 values beside float32 keys, as under autocast", "each side is read in its own dtype")
@pytest.mark.parametrize("dtypes", MIXED, ids=str)
@pytest.mark.parametrize("name", ["compiled", "eager", "blockwise"])
def test_query_keys_and_values_of_different_dtypes(make_request, reference, error_of, name, dtypes):
    kernel = next(kernel for kernel in OWN_KERNELS if kernel.name == name)
    if (problem := kernel.why_unavailable()) is not None:
        pytest.skip(problem)
    for fields in (dict(tokens=40), dict(tokens=333), dict(sink_length=5, tokens=700)):
        request = make_request(dtypes=dtypes, queries=3 if name == "blockwise" else 1, head_dim=64, **fields)
        assert kernel.why_unsupported(request) is None
        output = kernel.attend(request)
        assert output.dtype == dtypes[0]
        assert error_of(output, reference(request)) < ROUNDED[dtypes[0]]


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_states_of_a_dtype_that_no_cache_takes_are_refused(make_request, dtype):
    kernel = next(kernel for kernel in OWN_KERNELS if kernel.name == "compiled")
    request = make_request()
    object.__setattr__(request, "query", request.query.to(dtype))
    assert kernel.why_unsupported(request) == f"does not read states of {dtype}"


@pytest.mark.case("a forward under torch.autocast", "no kernel is distrusted, and sums stay in float32")
@pytest.mark.parametrize("queries", [1, 5])
def test_autocast_changes_no_number(make_request, reference, error_of, queries):
    request, kernel_cache = make_request(dtypes=(F32, F32, BF16), queries=queries), KernelCache()
    with torch.autocast("cpu", torch.bfloat16):
        first, second = (attend_packed(request, kernel_cache) for _ in range(2))
        eager = attend_packed(make_request(dtypes=(F32, F32, BF16), softcap=1e9, queries=queries), KernelCache())
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == BF16, "autocast is on again"
    for output in (first, second, eager):
        assert error_of(output, reference(request)) < FP32_ERROR
    assert not any("differed" in reason for reason in kernel_cache.passed_over.values())


@pytest.mark.parametrize("side", ["key", "value"])
def test_a_lost_group_is_read_as_nan(kernel, make_request, side):
    def lose(keys, values):
        (keys if side == "key" else values)[0, 1, 7, 5] = torch.inf

    output = kernel.attend(make_request(change=lose, residual_length=0))
    assert output[0, :, 3:].isnan().any()
    assert output[0, :, :3].isfinite().all()
    assert output[1].isfinite().all()


def test_a_row_that_sees_nothing_gives_zeros(kernel, make_request):
    mask = PADDED.clone()
    mask[0] = False
    output = kernel.attend(make_request(mask=mask))
    assert output[0].eq(0).all()
    assert output[1].ne(0).all()


@pytest.mark.parametrize("threads", [1, 3])
def test_pieces_of_work_are_merged(make_request, reference, error_of, threads):
    """One head and several threads: the history is split, and the parts are put together again."""
    kernel = next(kernel for kernel in OWN_KERNELS if kernel.name == "compiled")
    if (problem := kernel.why_unavailable()) is not None:
        pytest.skip(problem)
    options = dict(tokens=3000, heads=1, head_dim=64, sink_length=3, rotation_v="hadamard")
    request = make_request(**options, sink_logits=torch.tensor([1.0, 2.0, 3.0]))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        output = kernel.attend(request)
    finally:
        torch.set_num_threads(before)
    assert request.pair.kernel_cache.kernel_data["compiled"].request.splits == (1 if threads == 1 else 6)
    assert error_of(output, reference(request)) < FP32_ERROR


WINDOW = torch.ones(70, 403, dtype=torch.bool).tril(333).triu(333 - 59)[None, None]
"""Each query sees 60 tokens, and none of most pieces."""
BLOCKWISE = {
    "causal": dict(),
    "masked": dict(mask=torch.ones(70, 403, dtype=torch.bool).tril(333)[None, None], sink_length=4),
    "additive": dict(mask=torch.linspace(-3, 3, 6 * 403).reshape(1, 6, 1, 403)),
    "a window": dict(mask=WINDOW),
    "a window, additive": dict(mask=torch.zeros(WINDOW.shape).masked_fill(~WINDOW, -torch.inf)),
    "a window, with the least number": dict(mask=torch.finfo(torch.float32).min * (1 - WINDOW.float())),
    "a window of one head": dict(mask=torch.cat([WINDOW, *5 * [WINDOW.new_ones(WINDOW.shape).tril(333)]], dim=1)),
    "sees everything": dict(is_causal=False),
    "sink logits": dict(sink_logits=torch.linspace(-2, 6, 6)),
    "sink logits and a window": dict(sink_logits=torch.linspace(-2, 6, 6), mask=WINDOW),
}


@pytest.mark.parametrize("case", BLOCKWISE)
@pytest.mark.parametrize("name", ["blockwise", "eager"])
def test_many_queries(make_request, reference, error_of, name, case, monkeypatch):
    # Small pieces, so that there are several.
    monkeypatch.setattr("kvq.attention.kernels.stored_pieces.PIECE_ELEMENTS", 2 * 2 * 96 * 70)
    kernel = next(kernel for kernel in OWN_KERNELS if kernel.name == name)
    request = make_request(queries=70, **BLOCKWISE[case])
    assert kernel.why_unsupported(request) is None
    assert error_of(kernel.attend(request), reference(request)) < FP32_ERROR


def test_what_the_blockwise_kernel_does_not_serve(make_request):
    kernel = BlockwiseKernel()
    assert "several queries" in kernel.why_unsupported(make_request())
    assert "cap" in kernel.why_unsupported(make_request(queries=3, softcap=2.0))
    assert "one head dim" in kernel.why_unsupported(make_request(queries=3, value_dim=64))


@pytest.mark.parametrize("name", ["norm_codebook", "static_float8"])
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("records", [(), ("compiled",)], ids=["no record", "record"])
def test_quantizers_that_are_not_affine(make_request, reference, error_of, name, queries, give_records, records):
    give_records(*records)
    import reference_quantizers

    spec = {"norm_codebook": reference_quantizers.NORM_CODEBOOK, "static_float8": reference_quantizers.STATIC_FLOAT8}[
        name
    ]
    bits = spec.capabilities.nbits[0]
    request = make_request(backend=spec, nbits_k=bits, nbits_v=bits, queries=queries)
    choice = get_kernel_registry().choose(request)
    assert choice.kernel.name == ("eager" if queries == 1 else "blockwise")
    assert "packed format" in choice.passed_over["compiled"]
    assert error_of(choice.kernel.attend(request), reference(request)) < FP32_ERROR
    assert error_of(OWN_KERNELS[-1].attend(request), reference(request)) < FP32_ERROR


def test_a_step_allocates_nothing_of_the_size_of_the_history(kernel, make_request, monkeypatch):
    monkeypatch.setattr("kvq.attention.kernels.stored_pieces.PIECE_ELEMENTS", 1 << 14)
    largest = []
    for tokens in (1000, 4000):
        request = make_request(tokens=tokens)
        history = 2 * 2 * tokens * 32
        with LargestTensor() as seen:
            kernel.attend(request)
        assert seen.elements < history / 4
        largest.append(seen.elements)
    assert largest[0] == largest[1], "it does not grow with the history"


def test_the_census_of_allocations_sees_a_materialized_history(make_request):
    request = make_request(tokens=1000)
    with LargestTensor() as seen:
        request.pair.key.materialize()
    assert seen.elements >= 2 * 2 * 1000 * 32
