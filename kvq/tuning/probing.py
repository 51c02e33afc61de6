"""What settings of single layers change in a model's predictions, each against full precision on the same tokens.

Full precision reads the text once. Its predictions and the states before each layer are kept. A probe then runs from
the first layer that it quantizes on, and several probes run as rows of one batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from kvq.cache.kvq import KVQ
from kvq.config import KVQCacheConfig
from kvq.evaluation.quality.forcing import read_on
from kvq.evaluation.quality.prefix import Prefix
from kvq.evaluation.quality.text import TokenText
from kvq.layers.quantized_layer import KVQLayer
from kvq.transformers_seams.layer_kinds import kind_of, new_layer
from kvq.tuning.judging import Head, Judge
from kvq.tuning.layer_skipping import Recorder, find_layer_modules, skipping
from kvq.tuning.row_layers import OneSide, RowRuns
from kvq.tuning.search_space import find_quantizable
from kvq.tuning.side_setting import FULL_PRECISION, Assignment, Pair, build_config

MAX_KL_OF_SKIPPING = 1e-4
"""Largest divergence of a token at which leaving out layers counts as correct: in float32 it is zero, in bfloat16 it
may be a rounding of the logits; a wrong state is far from both."""


class Probes:
    """A text that full precision has read, and that caches are compared on.

    Args:
        model: a causal model.
        text: the sequences; all are read together.
        base: the settings that all probes share: window, sinks, dtypes.
        prefill: tokens of each sequence that are read at once and not scored.
        step: tokens of each later forward.

    Attributes:
        skips: whether layers before the first quantized one are left out.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        text: TokenText,
        base: KVQCacheConfig,
        *,
        prefill: int,
        step: int,
    ) -> None:
        self._model = model
        self._base = base
        self._prefill = prefill
        self._scored = text.scored[prefill:]
        self._tokens = text.sequences.to(model.device)
        self._pieces = self._tokens[:, prefill:-1].split(step, dim=1)
        self._quantizable = set(find_quantizable(model, base))
        self._count = len(DynamicCache(config=model.config).layers)
        self._modules = find_layer_modules(model, self._count)
        self._head = Head(model)
        self.skips = False
        self._read()
        self.skips = self._is_right_to_skip()

    @torch.inference_mode()
    def measure(self, assignments: Sequence[Assignment]) -> list[torch.Tensor]:
        """Return the divergence of each predicted token under each assignment, float32 `[N, S]`, in nats.

        Args:
            assignments: what to quantize, in one batch; layers that are not named stay in full precision.
        """
        divergences = torch.cat(list(self._run(assignments)), dim=1)
        return list(divergences[:, self._scored].chunk(len(assignments)))

    @torch.inference_mode()
    def _read(self) -> None:
        """Read the text in full precision, and keep predictions and states."""
        self._prefix = Prefix(self._model, self._tokens[:, : self._prefill])
        self._states = self._prefix.states()
        recorder, cache, done = Recorder(), self._prefix.cache, self._prefill
        self._judges, self._inputs = list[Judge](), []
        for piece in self._pieces:
            with recorder.listening(self._modules), self._head.listening():
                logits = read_on(self._model, piece, cache)
            targets = self._tokens[:, done + 1 :][:, : piece.shape[1]]
            self._judges.append(self._head.make_judge(logits, targets))
            self._inputs.append(recorder.inputs)
            done += piece.shape[1]
        self._returns_tuple = recorder.returns_tuple
        self._prefix.forget()

    @torch.inference_mode()
    def _is_right_to_skip(self) -> bool:
        """Try it: full precision from the middle on must predict what it predicts from the beginning on."""
        if not self._modules or self._states is None or any(len(one) != self._count for one in self._inputs):
            return False
        self.skips = True
        try:
            found = self._run([{}], start=self._count // 2, pieces=1)
            return all(float(divergences.max()) <= MAX_KL_OF_SKIPPING for divergences in found)
        except Exception:  # noqa: BLE001  # code of any model, run in a way that it does not expect
            return False

    def _run(
        self, assignments: Sequence[Assignment], start: int | None = None, pieces: int | None = None
    ) -> Iterator[torch.Tensor]:
        """Yield for each forward the divergences `[N * B, T]` of all assignments."""
        times = len(assignments)
        first = min((index for one in assignments for index in one), default=0) if start is None else start
        first = first if self.skips else 0
        cache = self._fill_cache(assignments, first)
        yield torch.zeros(times * len(self._tokens), 1)  # the last token of the prompt sees exact states
        for number, piece in enumerate(self._pieces[:pieces]):
            states = self._inputs[number][first].repeat(times, 1, 1) if first else piece
            with (
                self._head.standing_aside(),
                skipping(self._modules, first, states, returns_tuple=self._returns_tuple),
            ):
                output = read_on(self._model, piece.repeat(times, 1), cache)
            self._advance(cache, first, piece.shape[1])
            yield self._judges[number](output)

    def _fill_cache(self, assignments: Sequence[Assignment], first: int) -> Cache:
        """Return a cache that holds the prompt for each assignment; layers before the first one count tokens only."""
        cache = self._build_cache(assignments)
        if self._states is None:
            read_on(self._model, self._tokens[:, : self._prefill].repeat(len(assignments), 1), cache)
            return cache
        self._advance(cache, first, self._prefill)
        for layer, states in list(zip(cache.layers, self._states, strict=True))[first:]:
            if states is not None:
                layer.update(*(one.repeat(len(assignments), 1, 1, 1) for one in states))
        return cache

    def _advance(self, cache: Cache, first: int, count: int) -> None:
        """Let layers that are left out count further tokens, by states of one number each."""
        token = torch.zeros(1, 1, count, 1, dtype=self._model.dtype, device=self._model.device)
        for layer, states in list(zip(cache.layers, self._states or (), strict=True))[:first]:
            if states is not None:
                layer.update(token, token)

    def _build_cache(self, assignments: Sequence[Assignment]) -> Cache:
        layers = self._empty_layers()
        quantized = {index for one in assignments for index in one}
        own = [self._build_layers(one) for one in assignments]
        for index in quantized:
            layers[index] = RowRuns([one[index] for one in own])
        return Cache(layers=layers)

    def _build_layers(self, assignment: Assignment) -> list[object]:
        """Return the layers of one assignment."""
        if not assignment:
            return self._empty_layers()
        layers = KVQ(build_config(self._base, assignment, self._count), model=self._model).layers
        plain = self._empty_layers()
        return [
            _read_as_told(layer, plain[index], assignment.get(index, FULL_PRECISION))
            for index, layer in enumerate(layers)
        ]

    def _empty_layers(self) -> list[object]:
        """Return layers in full precision; one that could be quantized has nothing but tokens."""
        plain = DynamicCache(config=self._model.config).layers
        return [
            new_layer() if index in self._quantizable and not kind_of(layer).slides else layer
            for index, layer in enumerate(plain)
        ]


def _read_as_told(layer: object, plain: object, pair: Pair) -> object:
    """Return a layer that reads the sides that a pair quantizes from their codes, and the others exactly."""
    if not isinstance(layer, KVQLayer):
        return plain
    if pair.key is not None and pair.value is not None:
        return layer
    return OneSide(layer, plain, "key" if pair.value is None else "value")
