"""Decoding steps of a whole model as one CUDA graph, from flush to flush.

Python and the launches of some hundred kernels take longer than the work of a step on a GPU. A graph holds all of them.
A step that quantizes runs as it does without graphs, and so does every other step that a graph cannot hold.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvq.attention.entry import READ_OPTIONS
from kvq.attention.full_precision import find_option_beyond
from kvq.attention.kernels.triton.kernel import TRITON
from kvq.attention.step_states import StepStates
from kvq.cache.kvq import KVQ
from kvq.errors import CacheStateError
from kvq.layers.fixed_step import FixedStep
from kvq.layers.quantized_layer import KVQLayer
from kvq.transformers_seams.private_names import CACHE_NAMES, name_cache

_LOG = logging.getLogger("kvq")

Replay = Callable[[], None]
LEAST_ROOM = 1024
"""Tokens that a store may grow by before its graph is recorded again, at least."""
ROOM_SHARE = 8
"""Or the store's length by this: programs for tokens that are not there yet are idle."""
READER = TRITON.name
"""The kernel of the steps that are recorded; where another one is chosen, none is."""
UNRECORDABLE = (RuntimeError, AttributeError, TypeError, ValueError, LookupError)
"""What ends a recording: a model waits for the device in the middle of a step, or does with its keys and values what
their stand-ins cannot."""
WORTHWHILE, MOST_FAILURES = 8, 3
"""Replays that make a recording worth its time, and how many in a row may be worth less before no other is tried: rows
change places at every step of a beam search."""


def record_cuda_graph(run: Callable[[], None]) -> Replay:
    """Record the work of `run` on the current CUDA device, without doing it; return what does it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    replay: Replay = graph.replay
    return replay


DEVICE_TYPE = "cuda"
PLAIN_ARGUMENTS = {
    *("input_ids", "attention_mask", "position_ids", "cache_position", "use_cache", "return_dict", "logits_to_keep"),
    *CACHE_NAMES,
}
"""Arguments of a forward that a step obeys, or that say nothing new of one token in a batch without padding."""


def is_plain_step(arguments: Mapping[str, Any]) -> bool:
    """Return whether a forward on a CUDA device with these arguments adds one token a row and wants only its logits."""
    tokens, mask = arguments.get("input_ids"), arguments.get("attention_mask")
    if not isinstance(tokens, torch.Tensor) or tokens.device.type != DEVICE_TYPE or tokens.shape[1:] != (1,):
        return False
    given = {name for name, value in arguments.items() if value is not None and value is not False}
    is_plain = given <= PLAIN_ARGUMENTS and (mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 2))
    # Without positions a model finds them by itself, perhaps from what it remembers of images.
    has_positions = isinstance(arguments.get("position_ids"), torch.Tensor)
    return is_plain and has_positions and arguments.get("return_dict") is not False and not torch.is_grad_enabled()


class DecodeGraph:
    """The steps of one model with one cache, one token a row and no padding.

    Args:
        model: a model of transformers whose attention is "kvq".
        cache: holds the prompt.
        forward: the model's forward; by default that of `model`.
        record: records work on a device; by default as a CUDA graph.

    Attributes:
        cache: the cache.
        obstacle: why the next step is not replayed, or None.
        replays: steps that were replayed.
        recordings: graphs that were recorded.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: KVQ,
        *,
        forward: Callable[..., Any] | None = None,
        record: Callable[[Callable[[], None]], Replay] | None = None,
    ) -> None:
        self.cache, self.replays, self.recordings = cache, 0, 0
        self.obstacle: str | None = "nothing is recorded yet"
        self._model, self._forward, self._record = model, forward or model.forward, record or record_cuda_graph
        self._takes_positions = "position_ids" in inspect.signature(self._forward).parameters
        self._cache_name = name_cache(self._forward)
        self._steps: dict[int, FixedStep] = {}
        self._replay: Replay | None = None
        self._failures = self._replays_before = 0

    @torch.no_grad()
    def step(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Add one token to each row of the cache, and return the logits `[B, 1, V]` behind it.

        Args:
            input_ids: int64 `[B, 1]`.
            position_ids: int64 `[B, 1]`, or of the shape that the model wants; by default the length of the cache.
        """
        if position_ids is None:
            position_ids = torch.full_like(input_ids, self.cache.get_seq_length())
        logits = self.replay(input_ids, position_ids)
        if logits is None:
            logits = self._call(input_ids, position_ids, self.cache)[:, -1:]
            self.prepare(input_ids, position_ids)
        return logits

    def replay(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor | None:
        """Do as `step` where the step can be replayed; else do nothing and return None."""
        if self._replay is None or not self._fits(input_ids, position_ids) or not self._may_run():
            return None
        self._tokens.copy_(input_ids)
        self._positions.copy_(position_ids)
        self._replay()
        for step in self._steps.values():
            step.note_run()
        self.replays += 1
        return self._logits.clone()

    @torch.no_grad()
    def prepare(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> None:
        """Take over what the cache holds after a step that was not replayed; record the next one where it must be.

        Args:
            input_ids: the tokens of a step like those to come.
            position_ids: their positions.
        """
        if self._replay is not None and self._fits(input_ids, position_ids) and self._refresh():
            return
        if self.replays - self._replays_before >= WORTHWHILE:
            self._failures = 0
        self._replay, self._steps = None, {}
        if self._failures >= MOST_FAILURES:
            return
        self.obstacle = self._why_not_recorded()
        if self.obstacle is None:
            self._failures, self._replays_before = self._failures + 1, self.replays
            self._record_step(input_ids, position_ids)

    def _fits(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> bool:
        return input_ids.shape == self._tokens.shape and position_ids.shape == self._positions.shape

    def _may_run(self) -> bool:
        return all(step.may_run() for step in self._steps.values())

    def _call(self, input_ids: torch.Tensor, position_ids: torch.Tensor, cache: Cache) -> torch.Tensor:
        given = {"position_ids": position_ids} if self._takes_positions else {}
        output = self._forward(input_ids=input_ids, use_cache=True, **given, **{self._cache_name: cache})
        logits: torch.Tensor = output.logits
        return logits

    def _refresh(self) -> bool:
        """Return whether the recording holds for what the cache holds now."""
        try:
            for step in self._steps.values():
                step.refresh()
        except CacheStateError as error:
            self.obstacle = str(error)
            return False
        return True

    def _why_not_recorded(self) -> str | None:
        if not self._takes_positions:
            return f"{type(self._model).__name__} takes no position_ids"
        if self.cache.padding is not None:
            return "the batch is padded"
        if torch.is_autocast_enabled(self._model.device.type):
            return "autocast"
        if len(set(getattr(self._model, "hf_device_map", {}).values())) > 1:
            return "the model lies on several devices"
        others = [type(layer).__name__ for layer in self.cache.layers if type(layer) is not KVQLayer]
        if others or not self.cache.layers:
            return f"the cache has layers that no graph holds: {', '.join(sorted(set(others)))}"
        readers = {layer.kernel_cache.last_reader for layer in self.cache.layers}
        return None if readers == {READER} else f"attention was computed by {', '.join(sorted(readers))}"

    def _record_step(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> None:
        with torch.inference_mode(False):  # else they could not be written to outside of it
            self._tokens, self._positions = input_ids.clone(), position_ids.clone()
        stand_in = _StandIn(self.cache, self._steps)
        try:
            self._call(self._tokens, self._positions, stand_in)  # compiles; no layer notes the token
            for step in self._steps.values():
                step.refresh()
            self._replay = self._record(lambda: self._keep(self._call(self._tokens, self._positions, stand_in)))
        except UNRECORDABLE as error:
            _LOG.info("a step of %s is not recorded", type(self._model).__name__, exc_info=True)
            self.obstacle, self._steps, self._replay = str(error).partition("\n")[0], {}, None
            return
        for step in self._steps.values():
            step.refresh()
        self.obstacle, self.recordings = None, self.recordings + 1

    def _keep(self, logits: torch.Tensor) -> None:
        self._logits = logits[:, -1:]


class _StandIn(Cache):
    """Stands for the cache in a step that is recorded: states go to the steps of the layers.

    Args:
        cache: the cache.
        steps: by layer; a step that is missing is made.
    """

    def __init__(self, cache: KVQ, steps: dict[int, FixedStep]) -> None:
        super().__init__(layers=list(cache.layers))
        self._steps = steps

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Return what takes the query of the layer to its step."""
        del args, kwargs

        def take_query(query: torch.Tensor, mask: torch.Tensor | None, options: Mapping[str, Any]) -> torch.Tensor:
            if layer_idx not in self._steps:
                self._steps[layer_idx] = _make_step(self.layers[layer_idx], query, mask, options)
            return self._steps[layer_idx].run(query, key_states, value_states)

        states = StepStates(take_query)
        return states, states


def _make_step(layer: Any, query: torch.Tensor, mask: torch.Tensor | None, options: Mapping[str, Any]) -> FixedStep:
    beyond = "mask" if mask is not None else find_option_beyond(READ_OPTIONS, options)
    if beyond is not None or options.get("dropout"):
        raise CacheStateError(f"layer {layer.layer_idx}: attention is given {beyond or 'dropout'}")
    scaling, stored = options.get("scaling"), layer.side("key").store.length
    return FixedStep(
        layer,
        query,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        _room(stored, layer.flush_length),
        softcap=options.get("softcap"),
        sink_logits=options.get("s_aux"),
    )


def _room(stored: int, flush_length: int) -> int:
    """Return how many tokens a store of this length gets room for."""
    room = stored + max(LEAST_ROOM, stored // ROOM_SHARE)
    return -(-room // flush_length) * flush_length
