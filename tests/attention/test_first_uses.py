"""When a kernel is tried against the reference: once for each kind in a process, whatever the caches and lengths."""

import pytest
import torch
import transformers

from kvq import KVQ, attach
from kvq.attention.dispatch.kernel_cache import KernelCache
from kvq.attention.entry import attend_packed
from kvq.attention.kernels.eager.kernel import REFERENCE, EagerKernel
from kvq.plugin_api.packed_format import get_packed_format


class Probe:
    """Computes as the reference does, unless a request is of the kind that it gets wrong."""

    name = "probe"
    device_types = frozenset()
    needs_benchmark = False

    def __init__(self, is_wrong):
        self.is_wrong = is_wrong

    def why_unavailable(self):
        return None

    def why_unsupported(self, request):
        return None

    def attend(self, request):
        output = EagerKernel().attend(request)
        return output * 1.1 if self.is_wrong(request) else output


@pytest.fixture
def references(monkeypatch):
    """The requests that the reference was asked."""
    asked = []
    attend = REFERENCE.attend
    monkeypatch.setattr(REFERENCE, "attend", lambda request: asked.append(request) or attend(request), raising=False)
    return asked


@pytest.fixture
def put(put_kernels, references):
    """Make a kernel that is wrong where `is_wrong` says so the preferred one; nothing has been verified yet."""
    return lambda is_wrong=lambda request: False: put_kernels(Probe(is_wrong), REFERENCE)


def serve(request):
    kernel_cache = KernelCache()
    return attend_packed(request, kernel_cache), kernel_cache.last_reader


def test_a_second_cache_does_without_the_reference(put, references, make_request, reference, error_of):
    put()
    for tokens in (333, 333, 700, 1200):
        request = make_request(tokens=tokens)
        output, reader = serve(request)
        assert reader == "probe"
        assert error_of(output, reference(request)) < 1e-5
    assert len(references) == 1
    put()
    serve(make_request())
    assert len(references) == 2


def test_generating_again_does_without_the_reference(put, references):
    put()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with attach(model, nbits_k=4, nbits_v=4, residual_length=32, q_group_size=32):
        counts = []
        for length in (100, 100, 180):
            model.generate(torch.arange(2, 92)[None].repeat(1, 2)[:, :length], max_new_tokens=6, do_sample=False)
            counts.append(len(references))
    assert counts[0] >= 1
    assert counts == [counts[0]] * 3
    assert counts[0] < 3, "nor does each layer try it"
    cache = KVQ(model=model, nbits_k=8, nbits_v=4, residual_length=32, q_group_size=32)
    model.set_attn_implementation("kvq")
    model.generate(torch.arange(2, 92)[None], past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert len(references) == counts[0] + 1, "other bits are another kind"


def packed(side):
    return get_packed_format(side.store.codec)


MASK = torch.ones(2, 1, 1, 334, dtype=torch.bool)
KINDS = {
    "softcap": (dict(softcap=3.0), lambda request: request.softcap is not None),
    "sink logits": (dict(sink_logits=torch.zeros(6)), lambda request: request.sink_logits is not None),
    "several queries": (dict(queries=3), lambda request: request.query.shape[2] > 1),
    "bool mask": (dict(mask=MASK), lambda request: request.mask is not None and request.mask.dtype == torch.bool),
    "additive mask": (
        dict(mask=torch.zeros(2, 1, 1, 334)),
        lambda request: request.mask is not None and request.mask.dtype != torch.bool,
    ),
    "reordered rows": (dict(rows=[1, 0]), lambda request: request.pair.key.store.segments[0].rows is not None),
    "sinks": (dict(sink_length=5), lambda request: request.pair.key.sinks.states is not None),
    "padding": (dict(padding=(3, 0)), lambda request: request.pair.key.sinks.starts == (3, 0)),
    "dtype": (dict(dtype=torch.bfloat16), lambda request: request.query.dtype == torch.bfloat16),
    "bits": (dict(nbits_v=2), lambda request: packed(request.pair.value).bits == 2),
    "granularity": (dict(axis_key="per_token"), lambda request: not packed(request.pair.key).per_channel),
    "group length": (dict(q_group_size=16), lambda request: packed(request.pair.key).group_length == 16),
    "rotation": (dict(rotation_k="hadamard"), lambda request: packed(request.pair.key).rotation_block),
    "balance": (dict(balance_k="rms"), lambda request: packed(request.pair.key).has_factor),
    "metadata": (
        dict(metadata_dtype="float32"),
        lambda request: packed(request.pair.key).scale_dtype == torch.float32,
    ),
    "metadata in bytes": (dict(metadata_dtype="int8"), lambda request: packed(request.pair.key).has_units),
    "head dim": (dict(value_dim=64), lambda request: request.pair.value.like.shape[3] == 64),
    "queries per head": (dict(sharing=2), lambda request: request.queries_per_head == 2),
    "nothing stored": (dict(tokens=20), lambda request: not request.pair.key.store.segments),
    "not causal": (dict(is_causal=False), lambda request: not request.is_causal),
}
PLAIN = dict(sink_length=0)


@pytest.mark.parametrize("name", KINDS)
def test_a_kernel_that_is_wrong_for_one_kind_is_found_at_its_first_use(put, references, make_request, error_of, name):
    options, is_wrong = KINDS[name]
    put(is_wrong)
    assert serve(make_request(**PLAIN))[1] == "probe"
    special = make_request(**{**PLAIN, **options})
    with pytest.warns(UserWarning, match="'probe' on cpu differs from the reference"):
        output, reader = serve(special)
    assert reader == "eager"
    tolerance = 1e-2 if special.query.dtype == torch.bfloat16 else 1e-6
    assert error_of(output, EagerKernel().attend(special).double()) < tolerance
    assert serve(make_request(**PLAIN))[1] == "eager", "a kernel that was wrong once is used for no other kind"


def test_a_layer_notices_a_kind_that_comes_later(put, make_request):
    """Rows that are reordered between two steps of one layer are another kind to it."""
    put(lambda request: request.is_reordered)
    first = make_request()
    layer, kernel_cache = make_request.layer, KernelCache()
    attend_packed(first, kernel_cache)
    layer.reorder_cache(torch.tensor([1, 0]))
    handle, _ = layer.update(*torch.randn(2, 2, 2, 1, 32), packed=True)
    with pytest.warns(UserWarning, match="differs from the reference"):
        attend_packed(type(first)(first.query, handle.pair, None, 0.1), kernel_cache)
    assert kernel_cache.last_reader == "eager"


def test_sizes_of_a_batch_make_no_other_kind_and_queries_a_head_do(make_request):
    sizes = [dict(batch=2, heads=2), dict(batch=1, heads=4), dict(batch=3, heads=1)]
    kinds = [make_request(**one, sharing=3).kind_across_layers() for one in sizes]
    assert kinds[0] == kinds[1] == kinds[2] != make_request(sharing=2).kind_across_layers()


def test_quantizers_that_are_not_affine_are_told_apart(make_request):
    import reference_quantizers

    specs = [reference_quantizers.NORM_CODEBOOK, reference_quantizers.STATIC_FLOAT8]
    kinds = [
        make_request(backend=spec, nbits_k=bits, nbits_v=bits, tokens=tokens).kind_across_layers()
        for spec in specs
        for bits, tokens in ((spec.capabilities.nbits[0], 333), (spec.capabilities.nbits[0], 500))
    ]
    assert kinds[0] == kinds[1] != kinds[2] == kinds[3]
