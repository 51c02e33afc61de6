import pytest
import torch
import transformers

VOCABULARY = 199
SMALL = dict(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=None)
DECODER = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **SMALL
)

FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(head_dim=64, **DECODER),
    "qwen3": lambda: transformers.Qwen3Config(head_dim=64, **DECODER),
    "mistral": lambda: transformers.MistralConfig(head_dim=64, sliding_window=250, **DECODER),
    "phi3": lambda: transformers.Phi3Config(**{**DECODER, "hidden_size": 128}),
    "gpt2": lambda: transformers.GPT2Config(n_embd=96, n_layer=2, n_head=2, n_positions=1024, **SMALL),
    "opt": lambda: transformers.OPTConfig(
        hidden_size=96, ffn_dim=96, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=96, **SMALL
    ),
}


def build_model(family, dtype=torch.float32, std=0.25):
    """A tiny random model whose greedy text does not settle on a few tokens; with `std=None` as transformers makes it.

    The larger the standard deviation of the weights, the sharper the attention and the more a small error grows.
    """
    torch.manual_seed(7)
    config = FAMILIES[family]()
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    matrices = {} if std is None else {name: p for name, p in model.named_parameters() if p.dim() == 2}
    for name, parameter in matrices.items():
        torch.nn.init.normal_(parameter, std=1.0 if "embed" in name or "wte" in name else std)
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def model(family):
    return build_model(family)


@pytest.fixture
def llama():
    return build_model("llama")


@pytest.fixture
def build():
    return build_model


@pytest.fixture
def prompts():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, VOCABULARY, (2, 300), generator=generator)


@pytest.fixture
def padded():
    """Two prompts of unequal length, padded on the left, and their mask."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCABULARY, (2, 300), generator=generator)
    mask = torch.ones_like(ids)
    ids[0, :41], mask[0, :41] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def assert_telling():
    """Check that a reference text is one that a broken cache could not produce by chance."""

    def check(text):
        distinct = min(len(set(row.tolist())) for row in text)
        assert distinct >= 8, f"the reference has only {distinct} distinct tokens and would prove nothing"

    return check


@torch.inference_mode()
def forced_logits(model, text, cache, *, prompt=300, chunk=300, step=1, mask=None):
    """Logits of every token past the prompt, which is fed in chunks; `step` of the tokens after it are fed at once."""
    starts = [*range(0, prompt, chunk), *range(prompt, text.shape[1], step)]
    logits = []
    for start, stop in zip(starts, [*starts[1:], text.shape[1]], strict=True):
        options = {}
        if mask is not None:
            seen = torch.cat([mask, mask.new_ones(len(mask), text.shape[1] - prompt)], dim=1)[:, :stop]
            options["attention_mask"] = seen
            if model.config.model_type != "opt":  # which derives positions from the mask by itself
                options["position_ids"] = (seen.cumsum(-1) - 1).clamp_min(0)[:, start:stop]
        logits.append(model(text[:, start:stop], past_key_values=cache, **options).logits)
    return torch.cat(logits, dim=1)[:, prompt - 1 : -1]


@pytest.fixture
def compare():
    """Largest difference as a share of the reference's range, and share of equal top tokens."""

    def measure(logits, reference):
        difference = (logits - reference).abs().max() / (reference.max() - reference.min())
        agreement = (logits.argmax(-1) == reference.argmax(-1)).float().mean()
        return difference.item(), agreement.item()

    return measure


@pytest.fixture
def forced():
    return forced_logits
