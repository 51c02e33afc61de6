"""Write a backend in one file, register it and generate from it.

    python examples/custom_backend.py
    python examples/custom_backend.py --reach 1.5
    python examples/custom_backend.py --model PATH_OR_ID --max-new-tokens 60

The backend clips: its levels span the mean of a group plus and minus `reach` standard deviations, so one outlier
does not make the steps coarse for all others. It decides codes, scale and offset; kvq packs, stores and reads them.
`plugins/kvq-template` is the same as an installable package, which needs no `register_backend`.
"""

from __future__ import annotations

import argparse

import torch
from pydantic import Field
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kvq import KVQ, register_backend
from kvq.evaluation.embedded_model import load_embedded_model
from kvq.evaluation.recall import decode_tokens, sample_recall_batch
from kvq.plugin_api import API_VERSION, BackendOptions, BackendSpec, Capabilities, QuantSpec


class ClippingOptions(BackendOptions):
    """What users may set under `backend_options: {clipping: ...}`."""

    reach: float = Field(default=2.5, gt=0, description="standard deviations from the mean to the outermost levels")


class ClippingQuantizer:
    """Rounds each group to evenly spaced levels around its mean; satisfies `kvq.plugin_api.AffineQuantizer`."""

    group_local = True  # the result for a group depends on nothing else

    def __init__(self, nbits: int, reach: float) -> None:
        self.largest_code = 2**nbits - 1
        self.reach = reach

    def encode(self, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return codes uint8 `[..., G]`, scale and offset fp32 `[...]` for groups fp32 `[..., G]`."""
        mean, deviation = groups.mean(-1), groups.std(-1, correction=0)
        low = torch.maximum(groups.amin(-1), mean - self.reach * deviation)
        high = torch.minimum(groups.amax(-1), mean + self.reach * deviation)
        scale = (high - low) / self.largest_code
        steps = (groups - low.unsqueeze(-1)) / torch.where(scale > 0, scale, 1.0).unsqueeze(-1)
        return steps.round().clamp(0, self.largest_code).to(torch.uint8), scale, low


def build(spec: QuantSpec, options: ClippingOptions) -> ClippingQuantizer:
    """Return the quantizer of the keys or the values of one layer."""
    return ClippingQuantizer(int(spec.nbits), options.reach)


CLIPPING = BackendSpec(
    name="clipping",
    api_version=API_VERSION,
    capabilities=Capabilities(nbits=(2, 3, 4, 5, 6, 7, 8)),
    build=build,
    options=ClippingOptions,
    summary="rounds to levels around the mean of each group and clips what lies beyond",
)


def main() -> None:
    arguments = parse_arguments()
    register_backend(CLIPPING)
    model, tokenizer, prompt, right = load_task(arguments.model)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    cache = KVQ(
        model=model,
        backend="clipping",
        nbits_k=5,
        nbits_v=3,
        backend_options={"clipping": {"reach": arguments.reach}},
    )
    max_new_tokens = arguments.max_new_tokens or (60 if arguments.model else 5)
    output = model.generate(**inputs, past_key_values=cache, max_new_tokens=max_new_tokens, do_sample=False)
    print(f"asked:     {prompt[-50:]}")
    print(f"generated: {tokenizer.decode(output[0, inputs['input_ids'].shape[1] :], skip_special_tokens=True)}")
    print(f"right:     {right}")
    print(cache.memory())


def load_task(name: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str, str]:
    """Return a model, its tokenizer, a list with a question about it, and the right answer."""
    if name is not None:
        facts = "\n".join(f"Locker {number} holds {number * 37 % 101} coins." for number in range(1, 81))
        prompt = f"{facts}\n\nQuestion: how many coins does locker 12 hold?\nAnswer:"
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
        model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        return model, AutoTokenizer.from_pretrained(name), prompt, f"{12 * 37 % 101}"
    model, tokenizer = load_embedded_model()
    batch = sample_recall_batch(1, 160, 1, generator=torch.Generator().manual_seed(4))
    prompt = decode_tokens([*batch.context[0].tolist(), *batch.questions[0, 0, :2].tolist()])
    return model, tokenizer, prompt, decode_tokens(batch.answers[0, 0].tolist())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Generate with a backend that is defined in this file.")
    parser.add_argument("--model", metavar="PATH_OR_ID", help="a causal model; default: the embedded one, offline")
    parser.add_argument("--reach", type=float, default=2.5, help="standard deviations that are kept; default: 2.5")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="default: 5, with --model 60")
    return parser.parse_args()


if __name__ == "__main__":
    main()
