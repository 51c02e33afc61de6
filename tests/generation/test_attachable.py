"""What `attach` does with models that come wrapped, compiled, composed or copied."""

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn

from kvq import KVQ, EncoderDecoderKVQ, attach
from kvq.errors import CacheStateError, ModelError
from kvq.layers.quantized_layer import KVQLayer

GREEDY = dict(max_new_tokens=12, do_sample=False)
EXACT = dict(residual_length=2048)
QUANTIZED = dict(nbits_k=4, nbits_v=4, residual_length=32, q_group_size=32)


def trace(model):
    """What `attach` may have left on a model: instance attributes, and the attention of each configuration."""
    implementations = [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]
    return set(vars(model)), implementations


class LowRank(nn.Module):
    """A linear layer with an addition of low rank, as adapters make it."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 4, bias=False), nn.Linear(4, base.out_features, bias=False)

    def forward(self, states):
        return self.base(states) + self.up(self.down(states))


class Adapted(nn.Module):
    """The shape of PEFT's models: a module around a model, which tells what it is around and hands `generate` on."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model

    def get_base_model(self):
        return self.base_model

    def generate(self, *args, **kwargs):
        return self.base_model.generate(*args, **kwargs)


def test_an_adapter_around_a_model(llama, prompts, assert_telling):
    before = llama.generate(prompts, **GREEDY)
    for layer in llama.model.layers:
        layer.self_attn.q_proj = LowRank(layer.self_attn.q_proj)
    adapted = Adapted(Adapted(llama))
    reference = adapted.generate(prompts, **GREEDY)
    assert_telling(reference[:, 300:])
    assert not torch.equal(reference, before)
    untouched = trace(llama)
    with attach(adapted, EXACT) as attachment:
        assert torch.equal(adapted.generate(prompts, **GREEDY), reference)
        assert attachment.model is llama
        assert attachment.cache.get_seq_length() == 311
    assert trace(llama) == untouched


def test_peft_itself(llama, prompts):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(llama, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    reference = adapted.generate(input_ids=prompts, **GREEDY)
    with attach(adapted, EXACT) as attachment:
        assert torch.equal(adapted.generate(input_ids=prompts, **GREEDY), reference)
        assert attachment.cache.get_seq_length() == 311


def test_a_compiled_model(llama, prompts, assert_telling):
    """`generate` is that of the model inside."""
    reference = llama.generate(prompts, **GREEDY)
    assert_telling(reference[:, 300:])
    compiled = torch.compile(llama, backend="eager")
    with attach(compiled, EXACT) as attachment:
        assert attachment.model is llama
        assert torch.equal(compiled.generate(prompts, **GREEDY), reference)
        assert attachment.cache.get_seq_length() == 311
        assert not attachment.cache.is_compileable, "so that generate compiles nothing by itself"


@pytest.mark.slow
@pytest.mark.costly
@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.7"), reason="torch 2.6 compiles no forward of transformers 5, by any cache"
)
def test_a_compiled_forward(llama, prompts):
    """What a compiler makes of the model ends where the cache begins."""
    llama.model.layers = llama.model.layers[:1]
    compiled = torch.compile(llama, backend="eager")
    cache, plain = KVQ(QUANTIZED), KVQ(QUANTIZED)
    with torch.inference_mode():
        for start, stop in ((0, 200), (200, 230)):
            found = compiled(prompts[:, start:stop], past_key_values=cache).logits
            expected = llama(prompts[:, start:stop], past_key_values=plain).logits
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert cache.layers[0].side("key").store.length == plain.layers[0].side("key").store.length == 192


@pytest.mark.parametrize("kind", ["DataParallel", "DistributedDataParallel"])
def test_copies_on_several_devices_are_refused(llama, kind):
    wrapped = object.__new__(getattr(nn.parallel, kind))
    nn.Module.__init__(wrapped)
    wrapped.module = llama
    before = trace(llama)
    with pytest.raises(ModelError, match=f"{kind} copies a model .* attach to model.module"):
        attach(wrapped)
    assert trace(llama) == before


def test_a_model_with_a_cache_of_its_own_kind_is_refused():
    config = transformers.XLNetConfig(vocab_size=99, d_model=32, n_layer=1, n_head=2, d_inner=32)
    with pytest.raises(ModelError, match="XLNetLMHeadModel brings a cache of its own kind"):
        attach(transformers.XLNetLMHeadModel(config))


def test_attaching_again_and_again_leaves_no_trace(llama, prompts):
    before = trace(llama)
    for fields in (EXACT, QUANTIZED, EXACT):
        with attach(llama, fields), attach(llama, QUANTIZED) as inner:
            llama.generate(prompts[:, :40], **GREEDY)
            assert inner.cache.config.residual_length == 32
        assert trace(llama) == before
    with pytest.raises(ZeroDivisionError), attach(llama), attach(llama):
        raise ZeroDivisionError
    assert trace(llama) == before
    for fields in (dict(layers={"0-1": {"full_precision": True}}), dict(residual_length=-1)):
        with pytest.raises(ValueError, match=r"residual_length|nothing in this model"), attach(llama):
            attach(llama, fields)
        assert trace(llama) == before
    with attach(llama):
        outer = attach(llama)
        inner = attach(llama)
        with pytest.raises(CacheStateError, match="reverse order"):
            outer.detach()
        inner.detach()
        outer.detach()
    assert trace(llama) == before


def test_the_parts_of_a_model_that_sees(llama):
    """Towers that hold no cache get our attention too, and give it plain states; all come back as they were."""
    small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(image_size=32, patch_size=8, **small),
        text_config=llama.config,
        image_token_index=198,
        vision_feature_layer=-1,
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.set_attn_implementation({"vision_config": "eager", "text_config": "sdpa"})
    before = trace(model)
    assert {"eager", "sdpa"} <= set(before[1])
    ids = torch.cat([torch.full((1, 16), 198), torch.arange(2, 100)[None]], dim=1)
    inputs = dict(input_ids=ids, pixel_values=torch.ones(1, 3, 32, 32))
    reference = model.generate(**inputs, **GREEDY)
    with attach(model, EXACT) as attachment:
        assert set(trace(model)[1]) == {"kvq"}
        assert torch.equal(model.generate(**inputs, **GREEDY), reference)
        assert [type(layer) for layer in attachment.cache.layers] == [KVQLayer] * 2
    assert trace(model) == before


@pytest.fixture
def translator():
    torch.manual_seed(0)
    config = transformers.BartConfig(
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        vocab_size=99,
        eos_token_id=None,
        forced_eos_token_id=None,
    )
    model = transformers.BartForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    return model


@pytest.mark.parametrize("mode", [dict(num_beams=3), dict(prompt_lookup_num_tokens=3)], ids=str)
@pytest.mark.parametrize("cross_attention", ["keep", "quantize"])
def test_modes_of_encoder_decoder_models(translator, mode, cross_attention):
    inputs = dict(input_ids=torch.arange(1, 51)[None], max_new_tokens=80, do_sample=False, **mode)
    reference = translator.generate(**inputs)
    before = trace(translator)
    with attach(translator, EXACT, cross_attention=cross_attention) as attachment:
        assert torch.equal(translator.generate(**inputs), reference)
        assert type(attachment.cache) is EncoderDecoderKVQ
    assert trace(translator) == before


def test_operations_of_an_encoder_decoder_cache(translator):
    cache = EncoderDecoderKVQ(QUANTIZED, model=translator, cross_attention="quantize")
    assert cache.is_croppable
    inputs = torch.arange(1, 91)[None].repeat(2, 1)
    ids = torch.randint(1, 99, (2, 120), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        encoded = translator.get_encoder()(inputs)
        translator(decoder_input_ids=ids, encoder_outputs=encoded, past_key_values=cache)
    before = cache.materialize(1)
    forked = cache.fork()
    forked.crop(-50)
    forked.batch_select_indices(torch.tensor([1]))
    forked.batch_repeat_interleave(3)
    forked.reorder_cache(torch.tensor([2, 1, 0]))
    assert (forked.get_seq_length(), cache.get_seq_length()) == (70, 120)
    for found, expected in zip(forked.materialize(1), before, strict=True):
        assert torch.equal(found, expected[[1, 1, 1], :, :70])
    crossed = forked.cross_attention_cache.materialize(0)[0]
    assert torch.equal(crossed, cache.cross_attention_cache.materialize(0)[0][[1, 1, 1]])
    assert len(cache.memory().layers) == 4
    assert cache.memory().compression > 1.3
    forked.reset()
    assert (forked.get_seq_length(), any(forked.is_updated.values())) == (0, False)
    assert torch.equal(cache.materialize(1)[0], before[0])
    assert all(cache.is_updated.values())
    with pytest.raises(ModelError, match="describes no encoder-decoder model; use KVQ"):
        EncoderDecoderKVQ(model=transformers.LlamaConfig())
