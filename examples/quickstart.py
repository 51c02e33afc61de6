"""Generate from a quantized cache with `attach`, and print the text and what the cache holds.

    python examples/quickstart.py
    python examples/quickstart.py --config examples/configs/k8v4.yaml
    python examples/quickstart.py --model smollm2
    python examples/quickstart.py --model PATH_OR_ID --prompt "Once upon a time" --max-new-tokens 300

Without `--model` it runs offline on the small recall model that ships with kvq, which reads a list of records and is
asked for one of them. Any other model reads some of Python's manual and goes on.
"""

from __future__ import annotations

import argparse
from pydoc_data.topics import topics

import torch

from kvq import attach
from kvq.evaluation.model_loading import EMBEDDED_NAME, load_model
from kvq.evaluation.recall import decode_tokens, sample_recall_batch


def main() -> None:
    arguments = parse_arguments()
    is_embedded = arguments.model == EMBEDDED_NAME
    model, tokenizer = load_model(arguments.model, on_step=print)
    prompt, right = build_records() if is_embedded else (MANUAL, None)
    if arguments.prompt:
        prompt, right = arguments.prompt, None
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    max_new_tokens = arguments.max_new_tokens or (5 if is_embedded else 40)

    # Inside the block every `generate` gets a fresh quantized cache; without a configuration: 4-bit keys, 2-bit values.
    with attach(model, arguments.config) as attachment:
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)

    length = inputs["input_ids"].shape[1]
    print(f"prompt:    {length} tokens, the last of them {prompt[-50:]!r}")
    print(f"generated: {tokenizer.decode(output[0, length:], skip_special_tokens=True)}")
    if right is not None:
        print(f"right:     {right}")
    print(attachment.cache.memory())


MANUAL = "\n".join(topics[name] for name in ("assert", "for", "lambda", "while")) + "\n\nIn short, the assert statement"
"""A prompt for any language model, long enough for most of it to be quantized."""


def build_records() -> tuple[str, str]:
    """Return 160 records with a question about one of them, and the right answer, in words of the embedded model."""
    batch = sample_recall_batch(1, 160, 1, generator=torch.Generator().manual_seed(1))
    prompt = decode_tokens([*batch.context[0].tolist(), *batch.questions[0, 0, :2].tolist()])
    return prompt, decode_tokens(batch.answers[0, 0].tolist())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Generate from a quantized cache.")
    parser.add_argument(
        "--model",
        default=EMBEDDED_NAME,
        metavar="PATH_OR_ID",
        help="a causal model, or 'smollm2': a real one, fetched once; default: the embedded one, offline",
    )
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        help="default: a long list and a question about it; with --model, some of Python's manual",
    )
    parser.add_argument("--config", metavar="FILE", help="a configuration in YAML or JSON; default: kvq's defaults")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="default: 5, with --model 40")
    return parser.parse_args()


if __name__ == "__main__":
    main()
