"""Copies of a model that is attached, and models that share a part: each is plain again once nobody holds it."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
import transformers

from kvq import attach
from kvq.errors import ModelError

GREEDY = dict(max_new_tokens=6, do_sample=False)
SMALL = dict(nbits_k=2, nbits_v=2, residual_length=32, q_group_size=32)


def torch_saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),  # noqa: S301  # our own bytes
    "torch.save": torch_saved,
}


def implementations(model):
    return {part.config._attn_implementation for part in model.modules() if hasattr(part, "config")}


@pytest.mark.case("copy.deepcopy or torch.save of a model that is attached", "the copy is a plain model")
@pytest.mark.parametrize("nesting", [1, 2])
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_a_plain_model(llama, prompts, how, nesting):
    reference = llama.generate(prompts, **GREEDY)
    names = set(vars(llama))
    handles = [attach(llama, SMALL) for _ in range(nesting)]
    copied = COPIES[how](llama)
    assert implementations(copied) == {"sdpa"}
    assert copied.config is copied.model.config
    assert set(vars(copied)) - {"_attention_before_kvq"} == names
    assert not copied._forward_hooks
    assert torch.equal(copied.generate(prompts, **GREEDY), reference)
    quantized = llama.generate(prompts, **GREEDY)
    assert handles[-1].cache.get_seq_length() == 305, "the model itself is still attached"
    assert not torch.equal(quantized, reference)
    with attach(copied, SMALL) as again:
        assert torch.equal(copied.generate(prompts, **GREEDY), quantized)
        assert again.cache.get_seq_length() == 305
    for handle in reversed(handles):
        handle.detach()


def test_a_patch_of_the_users_own_is_copied(llama, prompts):
    """What stood on the model before comes back in a copy as well."""
    llama.generate = lambda *_args, **_kwargs: "mine"
    with attach(llama, SMALL):
        assert copy.copy(llama).generate(prompts) == "mine"
    assert llama.generate(prompts) == "mine"


class NamesOfClasses(pickle.Unpickler):
    """Notes the modules that a pickle names."""

    def __init__(self, file):
        super().__init__(file)
        self.modules = set()

    def find_class(self, module, name):
        self.modules.add(module.partition(".")[0])
        return super().find_class(module, name)


def test_a_pickled_model_names_nothing_of_kvq(llama):
    with attach(llama, SMALL):
        reader = NamesOfClasses(io.BytesIO(pickle.dumps(llama)))
    assert type(reader.load()) is type(llama)
    assert "transformers" in reader.modules
    assert "kvq" not in reader.modules


@pytest.mark.costly
def test_a_pickled_model_needs_no_kvq(llama, tmp_path):
    file = tmp_path / "model.pt"
    with attach(llama, SMALL):
        torch.save(llama, file)
    program = (
        "import sys, torch; sys.modules['kvq'] = None; model = torch.load(sys.argv[1], weights_only=False); "
        "print(model.config._attn_implementation, model.generate(torch.tensor([[5, 6]]), max_new_tokens=2).shape[1])"
    )
    done = subprocess.run([sys.executable, "-c", program, str(file)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["sdpa", "4"]


def test_a_saved_model_does_not_ask_for_our_attention(llama, tmp_path):
    with attach(llama, SMALL):
        llama.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert implementations(loaded) == {"sdpa"}


@pytest.fixture
def sharing(llama):
    """Another model around the same decoder and configuration."""
    other = type(llama)(llama.config)
    other.model, other.lm_head = llama.model, llama.lm_head
    return other.eval()


@pytest.mark.case(
    "two models that share a configuration, detached in the order of attaching", "each attention comes back"
)
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_models_that_share_are_detached_in_any_order(llama, sharing, prompts, order):
    reference = llama.generate(prompts, **GREEDY)
    handles = [attach(llama, SMALL), attach(sharing, SMALL)]
    handles[order[0]].detach()
    kept, model = handles[order[1]], (llama, sharing)[order[1]]
    assert implementations(llama) == {"kvq"}, "the other one still needs it"
    model.generate(prompts, **GREEDY)
    assert kept.cache.layers[0].kernel_cache.last_reader
    kept.detach()
    assert implementations(llama) == {"sdpa"}
    assert torch.equal(llama.generate(prompts, **GREEDY), reference)
    assert torch.equal(sharing.generate(prompts, **GREEDY), reference)


def test_a_failed_attach_lets_go(llama, sharing, monkeypatch):
    """The second model refuses the attention; the first keeps it, and gets its own back at the end."""
    handle = attach(llama, SMALL)

    def refuse(_name):
        raise ValueError("no")

    sharing.set_attn_implementation = refuse
    with pytest.raises(ValueError, match="no"):
        attach(sharing, SMALL)
    assert implementations(llama) == {"kvq"}
    handle.detach()
    assert implementations(llama) == {"sdpa"}


@pytest.mark.case("a model in float64", "refused by attach")
def test_a_model_in_double_precision_is_refused(build):
    with pytest.raises(ModelError, match=r"float64.*model\.to\(torch\.float32\)"):
        attach(build("llama", dtype=torch.float64))
