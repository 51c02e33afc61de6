"""Write a backend in one file, register it and generate from it.

    python examples/custom_backend.py
    python examples/custom_backend.py --reach 1.5
    python examples/custom_backend.py --model smollm2

The backend clips: its levels span the mean of a group plus and minus `reach` standard deviations, so one outlier
does not make the steps coarse for all others. It decides codes, scale and offset; kvq packs, stores and reads them.
`plugins/kvq-template` is the same as an installable package, which needs no `register_backend`.
"""

from __future__ import annotations

import argparse
from pydoc_data.topics import topics

import torch
from pydantic import Field

from kvq import KVQ, register_backend
from kvq.evaluation.model_loading import EMBEDDED_NAME, load_model
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
    is_embedded = arguments.model == EMBEDDED_NAME
    model, tokenizer = load_model(arguments.model, on_step=print)
    prompt, right = build_records() if is_embedded else (MANUAL, None)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    cache = KVQ(
        model=model,
        backend="clipping",
        nbits_k=5,
        nbits_v=3,
        backend_options={"clipping": {"reach": arguments.reach}},
    )
    max_new_tokens = arguments.max_new_tokens or (5 if is_embedded else 30)
    output = model.generate(**inputs, past_key_values=cache, max_new_tokens=max_new_tokens, do_sample=False)
    print(f"asked:     {prompt[-50:]}")
    print(f"generated: {tokenizer.decode(output[0, inputs['input_ids'].shape[1] :], skip_special_tokens=True)}")
    if right is not None:
        print(f"right:     {right}")
    print(cache.memory())


MANUAL = "\n".join(topics[name] for name in ("assert", "for", "lambda", "while")) + "\n\nIn short, the assert statement"
"""A prompt for any language model: some of Python's manual."""


def build_records() -> tuple[str, str]:
    """Return 160 records with a question about one of them, and the right answer, in words of the embedded model."""
    batch = sample_recall_batch(1, 160, 1, generator=torch.Generator().manual_seed(4))
    prompt = decode_tokens([*batch.context[0].tolist(), *batch.questions[0, 0, :2].tolist()])
    return prompt, decode_tokens(batch.answers[0, 0].tolist())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Generate with a backend that is defined in this file.")
    parser.add_argument(
        "--model",
        default=EMBEDDED_NAME,
        metavar="PATH_OR_ID",
        help="a causal model, or 'smollm2': a real one, fetched once; default: the embedded one, offline",
    )
    parser.add_argument("--reach", type=float, default=2.5, help="standard deviations that are kept; default: 2.5")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="default: 5, with --model 30")
    return parser.parse_args()


if __name__ == "__main__":
    main()
