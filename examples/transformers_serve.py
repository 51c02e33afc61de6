"""Start transformers' own server with quantized caches, and reuse what two prompts have in common.

    pip install "transformers[serving]"
    python examples/transformers_serve.py PATH_OR_ID --port 8000
    python examples/transformers_serve.py PATH_OR_ID --port 8000 --config examples/configs/k4v4.yaml --keep 8

Endpoints, streaming and all other options are those of `transformers serve`, which `transformers serve --help` lists:

    curl localhost:8000/v1/completions -H "Content-Type: application/json" \
        -d '{"prompt": "The assert statement", "max_tokens": 30}'

Each model that the server loads is attached. Its `generate` keeps the caches of the last requests: a prompt that begins
like one of them goes on from a fork, and a line of output says how many tokens that spared. One request of a model is
computed at a time. Without arguments the program shows the same without a server, on the model that ships with kvq.
"""

from __future__ import annotations

import argparse
from collections import deque
from pathlib import Path
from typing import Any

import torch
import typer
from transformers import GenerationConfig, PreTrainedModel
from transformers.cli.serve import Serve
from transformers.cli.serving.model_manager import ModelManager

from kvq import KVQ, attach
from kvq.errors import CacheStateError
from kvq.evaluation.model_loading import EMBEDDED_NAME, find_model_path
from kvq.evaluation.recall import decode_tokens, sample_recall_batch

LEAST_COMMON = 16
"""Tokens in common that are worth a fork."""
OTHER_CACHES = {
    "--continuous-batching": "keeps pages of full-precision states, in which a quantized cache has no place",
    "--compile": "keeps a static cache in full precision",
}


class PrefixReuse:
    """Takes the place of a model's `generate`: goes on from the cache of an earlier prompt that begins alike.

    Args:
        model: is attached.
        config: the configuration of the caches, or None for the defaults.
        keep: how many caches are kept.

    Attributes:
        attachment: the model's.
    """

    def __init__(self, model: PreTrainedModel, config: Path | None = None, keep: int = 4) -> None:
        self.attachment = attach(model, config)
        self._generate = model.generate
        self._kept: deque[KVQ] = deque(maxlen=keep)
        model.generate = self

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Generate; the server calls this in one thread for each model."""
        if args or not is_plain(options):
            return self._generate(*args, **options)  # from a quantized cache of its own, where that is possible
        prompt = options["input_ids"]
        cache, cached = self._find_cache(prompt)
        print(f"prompt:   {prompt.shape[1]} tokens, {cached} of them cached", flush=True)
        cache.token_ids = output = self._generate(past_key_values=cache, **options)
        self._kept.append(cache)
        return output

    def _find_cache(self, prompt: torch.Tensor) -> tuple[KVQ, int]:
        """Return a cache to go on with, and how many tokens of the prompt it holds."""
        best = max(self._kept, key=lambda cache: cache.count_matching(prompt), default=None)
        if best is not None and best.count_matching(prompt) >= LEAST_COMMON:
            try:
                cache = best.fork()
                return cache, cache.crop_to_prefix(prompt)
            except CacheStateError:
                pass  # states of linear attention and bounded windows cannot go back: read the whole prompt
        return KVQ(self.attachment.config, model=self.attachment.model), 0


def is_plain(options: dict[str, Any]) -> bool:
    """Return whether the tokens of one prompt tell all: no images beside them, no beams, no other cache."""
    tensors = {name for name, value in options.items() if isinstance(value, torch.Tensor)}
    config = options["generation_config"]
    rows = (config.num_beams or 1) * (config.num_return_sequences or 1)
    chooses_cache = config.cache_implementation is not None or config.use_cache is False
    return tensors == {"input_ids", "attention_mask"} and rows == 1 and not chooses_cache


def quantize_all_models(config: Path | None, keep: int) -> None:
    """Have every model that a server of this process loads attached; for the arguments see `PrefixReuse`."""
    load = ModelManager.load_model_and_processor

    def load_attached(self: ModelManager, *args: Any, **options: Any) -> Any:
        model, processor = load(self, *args, **options)
        if not isinstance(model.generate, PrefixReuse):
            PrefixReuse(model, config, keep)
        return model, processor

    ModelManager.load_model_and_processor = load_attached


def show() -> None:
    """Ask two questions about one document, which is read with the first of them."""
    models = ModelManager(device="cpu")
    model, tokenizer = models.load_model_and_processor(f"{find_model_path(EMBEDDED_NAME)}@main")
    batch = sample_recall_batch(1, 160, 2, generator=torch.Generator().manual_seed(1))
    document = decode_tokens(batch.context[0].tolist())
    greedy = GenerationConfig(max_new_tokens=4, do_sample=False)
    for question, right in zip(batch.questions[0], batch.answers[0], strict=True):
        inputs = tokenizer(f"{document} {decode_tokens(question[:2].tolist())}", return_tensors="pt")
        output = model.generate(**inputs, generation_config=greedy, tokenizer=tokenizer)
        print(f"answer:   {tokenizer.decode(output[0, -4:])}")
        print(f"right:    {decode_tokens(right.tolist())}\n")
    models.shutdown()  # else the process waits for the end of an idle model's time


def main() -> None:
    arguments, others = parse_arguments()
    quantize_all_models(arguments.config, arguments.keep)
    if not others:
        show()
        return
    server = typer.Typer(add_completion=False)
    server.command()(Serve)
    server(others)


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Return our arguments, and those of `transformers serve`."""
    parser = argparse.ArgumentParser(
        description="Start transformers' server with quantized caches that share their prefixes.",
        epilog="MODEL and all other arguments are those of `transformers serve`, as --port; without any: a short show.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="the configuration of the caches")
    parser.add_argument("--keep", type=int, default=4, metavar="N", help="caches that a model keeps; default: 4")
    arguments, others = parser.parse_known_args()
    if arguments.keep < 1:
        parser.error("--keep must be at least 1")
    for option, obstacle in OTHER_CACHES.items():
        if option in others:
            parser.error(f"{option} {obstacle}")
    return arguments, others


if __name__ == "__main__":
    main()
