"""The model type `kvq` of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from transformers.cache_utils import Cache

from kvq.attaching.attachment import attach
from kvq.cache.given_arguments import resolve_config
from kvq.cache.kvq import KVQ
from kvq.config import KVQCacheConfig
from kvq.errors import ConfigError, Fault, ModelError
from kvq.evaluation.continuations import ContinuationScore, Reading, plan_readings, score_readings

MODEL_TYPE = "kvq"
"""The name for `--model` and `simple_evaluate(model=...)`."""

TokenRequest = tuple[Any, list[int], list[int]]
"""What lm-evaluation-harness knows a request by, its context and its continuation."""


@register_model(MODEL_TYPE)
class KVQHarnessModel(HFLM):
    """A causal model whose cache is quantized.

    Args:
        pretrained: a model's name or folder, or the model, as for `hf`.
        kvq_config: path of a YAML or JSON file, a mapping, a `KVQCacheConfig`, or None for the defaults.
        kvq_step: tokens of each forward when log-likelihoods are read, at least 1. They see each other exactly: 1 reads
            as generation does; more is faster, but flatters the cache by as many exact tokens.
        **options: all other options of `hf`.

    Raises:
        ConfigError: the configuration or the step is wrong; it is raised before anything is loaded.
        ModelError: the cache cannot serve the model, e.g. an encoder-decoder model.
    """

    def __init__(
        self,
        pretrained: Any,
        kvq_config: KVQCacheConfig | Mapping[str, Any] | str | Path | None = None,
        kvq_step: int = 1,
        **options: Any,
    ) -> None:
        self.kvq_config = resolve_config(kvq_config)
        self.kvq_step = _check_step(kvq_step)
        _check_options(options)
        super().__init__(pretrained, **options)
        if self.backend != "causal":
            raise ModelError(f"model type {MODEL_TYPE!r} serves causal models only, this one is {self.backend!r}")
        self.attachment = attach(self.model, self.kvq_config)

    def get_model_info(self) -> dict[str, Any]:
        """Return the facts that lm-evaluation-harness saves with the results, the cache's configuration included."""
        ours = {"kvq_config": self.kvq_config.to_dict(), "kvq_step": self.kvq_step}
        return {**super().get_model_info(), **ours}

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], disable_tqdm: bool = False, override_bs: int | None = None, **_: Any
    ) -> list[tuple[float, bool]]:
        """Return log-likelihood and greediness of each continuation, in the order of the requests."""
        readings = plan_readings([request[1:] for request in requests], self.max_length)
        answers: dict[int, tuple[float, bool]] = {}
        hidden = disable_tqdm or self.rank != 0
        with tqdm(total=len(requests), disable=hidden, desc="Running loglikelihood requests") as progress:
            for place, score in self._score(readings, override_bs):
                answers[place] = score.log_likelihood, score.is_greedy
                if requests[place][0] is not None:  # loglikelihood_rolling: these are parts of a request
                    self.cache_hook.add_partial("loglikelihood", requests[place][0], answers[place])
                progress.update()
        return [answers[place] for place in range(len(requests))]

    def _score(self, readings: list[Reading], batch_size: int | None) -> Iterator[tuple[int, ContinuationScore]]:
        waiting = iter(readings)
        size = batch_size or self._find_batch_size(readings)
        while batch := list(islice(waiting, size)):
            with torch.autocast(
                self.device.type, dtype=self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
            ):
                yield from score_readings(
                    self.model, batch, self._build_cache, step=self.kvq_step, softmax_dtype=self.softmax_dtype
                )

    def _find_batch_size(self, readings: list[Reading]) -> int:
        """Return the batch size asked for; for `auto`, one with which the longest text fits in a single forward."""
        if self.batch_size != "auto" or not readings:
            return int(self.batch_size)
        longest = readings[0]
        request = (None, [*longest.prompt, *longest.steps[:1]], [*longest.steps[1:], 0])
        return int(self._detect_batch_size([request]))

    def _build_cache(self, padding: Sequence[int]) -> Cache:
        return KVQ(self.kvq_config, model=self.model, padding=padding if any(padding) else None)


def _check_step(step: Any) -> int:
    if isinstance(step, bool) or not isinstance(step, int) or step < 1:
        problem = f"{step!r} is not accepted: tokens of each forward, a whole number of at least 1"
        raise ConfigError([Fault(("kvq_step",), problem)])
    return step


def _check_options(options: Mapping[str, Any]) -> None:
    """Refuse misspelt options of ours, which `hf` would pass on to the model."""
    unknown = [name for name in options if name.startswith("kvq")]
    if unknown:
        raise ConfigError([Fault((name,), "no such option: kvq_config and kvq_step are ours") for name in unknown])
