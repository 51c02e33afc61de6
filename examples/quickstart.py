"""Generate from a quantized cache with `attach`, and print the text and what the cache holds.

    python examples/quickstart.py
    python examples/quickstart.py --config examples/configs/k8v4.yaml
    python examples/quickstart.py --model PATH_OR_ID --prompt "Once upon a time" --max-new-tokens 300

Without `--model` it runs offline on the small recall model that ships with kvq, which reads a list of records and is
asked for one of them.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kvq import attach
from kvq.evaluation.embedded_model import load_embedded_model
from kvq.evaluation.recall import decode_tokens, sample_recall_batch


def main() -> None:
    arguments = parse_arguments()
    model, tokenizer = load_model(arguments.model)
    prompt, right = build_facts() if arguments.model else build_records()
    if arguments.prompt:
        prompt, right = arguments.prompt, None
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    max_new_tokens = arguments.max_new_tokens or (100 if arguments.model else 5)

    # Inside the block every `generate` gets a fresh quantized cache; without a configuration: 4-bit keys, 2-bit values.
    with attach(model, arguments.config) as attachment:
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)

    length = inputs["input_ids"].shape[1]
    print(f"prompt:    {length} tokens, the last of them {prompt[-50:]!r}")
    print(f"generated: {tokenizer.decode(output[0, length:], skip_special_tokens=True)}")
    if right is not None:
        print(f"right:     {right}")
    print(attachment.cache.memory())


def load_model(name: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a model and its tokenizer; the embedded ones where `name` is None."""
    if name is None:
        return load_embedded_model()
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), AutoTokenizer.from_pretrained(name)


def build_records() -> tuple[str, str]:
    """Return 160 records with a question about one of them, and the right answer, in words of the embedded model."""
    batch = sample_recall_batch(1, 160, 1, generator=torch.Generator().manual_seed(1))
    prompt = decode_tokens([*batch.context[0].tolist(), *batch.questions[0, 0, :2].tolist()])
    return prompt, decode_tokens(batch.answers[0, 0].tolist())


def build_facts() -> tuple[str, str]:
    """Return a prompt for any language model, long enough for most of it to be quantized, and the right answer."""
    facts = "\n".join(f"Locker {number} holds {number * 37 % 101} coins." for number in range(1, 81))
    return f"{facts}\n\nQuestion: how many coins does locker 12 hold?\nAnswer:", f"{12 * 37 % 101}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Generate from a quantized cache.")
    parser.add_argument("--model", metavar="PATH_OR_ID", help="a causal model; default: the embedded one, offline")
    parser.add_argument("--prompt", metavar="TEXT", help="default: a long list and a question about it")
    parser.add_argument("--config", metavar="FILE", help="a configuration in YAML or JSON; default: kvq's defaults")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="default: 5, with --model 100")
    return parser.parse_args()


if __name__ == "__main__":
    main()
