"""Compare every usable backend at one pair of bits against full precision.

    python examples/compare_backends.py
    python examples/compare_backends.py --nbits-k 2 --nbits-v 2
    python examples/compare_backends.py --model smollm2

Offline on the small recall model that ships with kvq it counts right answers; with `--model` it shows the texts. An
installed third-party backend takes part by itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pydoc_data.topics import topics

import torch
from transformers import DynamicCache

from kvq import KVQ, KVQCacheConfig, KVQError, available_backends
from kvq.evaluation.model_loading import EMBEDDED_NAME, load_model
from kvq.evaluation.recall import sample_recall_batch
from kvq.evaluation.scoring import score_config, score_recall

CONTEXTS, RECORDS, QUESTIONS = 4, 160, 10
MANUAL = "\n".join(topics[name] for name in ("assert", "for", "lambda", "while")) + "\n\nIn short, a lambda expression"
"""A prompt for any language model: some of Python's manual."""


def main() -> None:
    arguments = parse_arguments()
    configs = list(find_configs(arguments.nbits_k, arguments.nbits_v))
    if arguments.model == EMBEDDED_NAME:
        compare_answers(configs)
    else:
        compare_texts(arguments.model, configs, arguments.max_new_tokens)


def find_configs(nbits_k: float, nbits_v: float) -> Iterator[KVQCacheConfig]:
    """Yield a configuration for each backend that is ready and has these bits; say why another one is left out."""
    for backend in available_backends(load=True):
        if backend.state != "ready":
            print(f"{backend.name} is left out: {backend.reason}")
            continue
        try:
            yield KVQCacheConfig(backend=backend.name, nbits_k=nbits_k, nbits_v=nbits_v)
        except KVQError as error:
            print(f"{backend.name} is left out: {error}")


def compare_answers(configs: list[KVQCacheConfig]) -> None:
    """Let the embedded model answer the same questions from each cache."""
    model, _ = load_model(EMBEDDED_NAME)
    batch = sample_recall_batch(CONTEXTS, RECORDS, QUESTIONS, generator=torch.Generator().manual_seed(1))
    print(f"{CONTEXTS * QUESTIONS} questions about {CONTEXTS} contexts of {batch.context.shape[1]} tokens\n")
    print(f"{'cache':<22} {'exact':>7} {'as full precision':>18} {'held':>11} {'smaller':>8}")
    reference = score_recall(model, batch, DynamicCache(config=model.config))
    print(f"{'full precision':<22} {reference.exact_rate:>7.1%}")
    for config in configs:
        score = score_config(model, batch, config, reference)
        held = f"{score.memory.total_bytes / 2**20:.2f} MiB"
        rates = f"{score.exact_rate:>7.1%} {score.agreement:>18.1%}"
        print(f"{name_of(config):<22} {rates} {held:>11} {score.memory.compression:>7.2f}x")


def compare_texts(name: str, configs: list[KVQCacheConfig], max_new_tokens: int) -> None:
    """Let a model continue the same prompt from each cache, greedily."""
    model, tokenizer = load_model(name, on_step=print)
    inputs = tokenizer(MANUAL, return_tensors="pt").to(model.device)

    def generate(cache: DynamicCache | KVQ) -> torch.Tensor:
        output = model.generate(**inputs, past_key_values=cache, max_new_tokens=max_new_tokens, do_sample=False)
        return output[0, inputs["input_ids"].shape[1] :]

    expected = generate(DynamicCache(config=model.config))
    print(f"full precision\n  {tokenizer.decode(expected)!r}")
    for config in configs:
        cache = KVQ(config, model=model)
        found = generate(cache)
        print(f"{name_of(config)}: {count_equal(expected, found)} of {len(expected)} tokens until the first difference")
        print(f"  {tokenizer.decode(found)!r}\n{cache.memory()}")


def count_equal(one: torch.Tensor, other: torch.Tensor) -> int:
    """Return the length of the common beginning."""
    length = min(len(one), len(other))
    differing = (one[:length] != other[:length]).nonzero()
    return int(differing[0]) if len(differing) else length


def name_of(config: KVQCacheConfig) -> str:
    return f"{config.backend} K{config.nbits_k:g}V{config.nbits_v:g}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare the backends at one pair of bits against full precision.")
    parser.add_argument(
        "--model",
        default=EMBEDDED_NAME,
        metavar="PATH_OR_ID",
        help="a causal model, or 'smollm2': a real one, fetched once; default: the embedded one, offline",
    )
    parser.add_argument("--nbits-k", type=float, default=4, metavar="BITS", help="of the keys; default: 4")
    parser.add_argument("--nbits-v", type=float, default=2, metavar="BITS", help="of the values; default: 2")
    parser.add_argument("--max-new-tokens", type=int, default=30, metavar="N", help="with --model; default: 30")
    return parser.parse_args()


if __name__ == "__main__":
    main()
