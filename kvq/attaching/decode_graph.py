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

from kvq.attaching.recorded_cache import RecordedCache
from kvq.attaching.wait_finder import WaitFinder
from kvq.attention.kernels.triton.kernel import TRITON
from kvq.cache.kvq import KVQ
from kvq.errors import CacheStateError
from kvq.layers.fixed_step import FixedStep
from kvq.layers.quantized_layer import KVQLayer
from kvq.transformers_seams.position_offsets import OFFSETS
from kvq.transformers_seams.private_names import CACHE_NAMES, name_cache

_LOG = logging.getLogger("kvq")

Replay = Callable[[], None]
Record = Callable[[Callable[[], None], torch.device], Replay]
DEVICE_TYPE = "cuda"
READER = TRITON.name
"""The kernel of the steps that are recorded; where another one is chosen, none is."""
WORTHWHILE, MOST_FAILURES = 8, 3
"""Replays that make a recording worth its time, and how many in a row may be worth less before no other is tried: rows
change places at every step of a beam search."""
PLAIN_ARGUMENTS = {
    *("input_ids", "attention_mask", "position_ids", "cache_position", "use_cache", "return_dict", "logits_to_keep"),
    *("tokenizer", "assistant_tokenizer"),
    *CACHE_NAMES,
}
"""Arguments of a forward that a step obeys, or that say nothing new of one token in a batch without padding."""
STAYING_OUTPUTS = {"logits", OFFSETS, *CACHE_NAMES}
"""What a step may return: the others would be those of the step that was recorded."""


def record_cuda_graph(run: Callable[[], None], device: torch.device) -> Replay:
    """Record the work of `run` on a CUDA device, without doing it; return what does it."""
    graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    try:
        # A stream of its own: torch's belongs to the device of its first capture.
        options: dict[str, Any] = {"stream": torch.cuda.Stream(device), "capture_error_mode": "thread_local"}
        with torch.cuda.device(device), torch.cuda.graph(graph, **options):
            run()
    except BaseException:
        torch.cuda.set_stream(before)  # which a capture that fails does not put back
        raise
    replay: Replay = graph.replay
    return replay


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

    A recording reads the weights where they were: after other weights or adapters have taken their place, make another
    object. Hooks of modules do not run in a replay.

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
        is_hopeless: whether a recording has failed in a way in which another one would too.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: KVQ,
        *,
        forward: Callable[..., Any] | None = None,
        record: Record | None = None,
    ) -> None:
        self.cache, self.replays, self.recordings, self.is_hopeless = cache, 0, 0, False
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
            position_ids: int64 `[B, 1]`, or of the shape that the model wants; by default `cache.next_position`.

        Raises:
            CacheStateError: the batch is padded, so the model needs a mask.
        """
        if self.cache.has_padding:
            raise CacheStateError("the rows are padded, and DecodeGraph.step takes no mask; call the model itself")
        if position_ids is None:
            position_ids = torch.full_like(input_ids, self.cache.next_position)
        output = self.replay(input_ids, position_ids)
        if output is None:
            output = self._call(input_ids, position_ids, self.cache)
            self.prepare(input_ids, position_ids, output)
        logits: torch.Tensor = output.logits[:, -1:]
        return logits

    def replay(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> Any:
        """Return the output of the next step where it can be replayed; else do nothing and return None."""
        if self._replay is None or not self._fits(input_ids, position_ids) or not self._may_run():
            return None
        self._tokens.copy_(input_ids)
        self._positions.copy_(position_ids)
        replay, self._replay = self._replay, None  # if the host is interrupted before all layers note the token
        replay()
        for step in self._steps.values():
            step.note_run()
        self._replay = replay
        self.replays += 1
        return self._make_output(logits=self._logits.clone())

    @torch.no_grad()
    def prepare(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, output: Any, mask: torch.Tensor | None = None
    ) -> None:
        """Take over what the cache holds after a step that was not replayed; record the next one where it must be.

        Args:
            input_ids: the tokens of that step.
            position_ids: their positions.
            output: what the model returned.
            mask: `[B, T]`, the padding mask that it was given; False: hidden.
        """
        self.obstacle = self._find_obstacle(input_ids, output, mask)
        if self.obstacle is None and self._fits(input_ids, position_ids) and self._refresh():
            return
        if self.replays - self._replays_before >= WORTHWHILE:
            self._failures = 0
        self._replay, self._steps = None, {}
        if self._failures >= MOST_FAILURES:
            self.obstacle = self.obstacle or "the recordings so far were of little use: rows change places"
        if self.obstacle is None:
            self._failures, self._replays_before = self._failures + 1, self.replays
            self._make_output = _Outputs(output)
            self._record_step(input_ids, position_ids)

    def _fits(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> bool:
        """Return whether there is a recording, of tokens and positions like these."""
        return bool(self._steps) and (input_ids.shape, position_ids.shape) == (
            self._tokens.shape,
            self._positions.shape,
        )

    def _may_run(self) -> bool:
        return self._holds_the_layers() and all(step.may_run() for step in self._steps.values())

    def _holds_the_layers(self) -> bool:
        """Return whether the cache still has the layers that were recorded; `restore` brings others."""
        return [step.layer for step in self._steps.values()] == list(self.cache.layers)

    def _call(self, input_ids: torch.Tensor, position_ids: torch.Tensor, cache: Cache) -> Any:
        given = {"position_ids": position_ids} if self._takes_positions else {}
        options = {"use_cache": True, "return_dict": True, self._cache_name: cache}
        return self._forward(input_ids=input_ids, **given, **options)

    def _refresh(self) -> bool:
        """Return whether the recording holds for what the cache holds now, which it then takes over."""
        if self._replay is None or not self._holds_the_layers():
            return False
        try:
            _refresh_all(self._steps)
        except CacheStateError:
            return False
        return True

    def _find_obstacle(self, input_ids: torch.Tensor, output: Any, mask: torch.Tensor | None) -> str | None:
        """Return why the next step is not replayed, or None; waits for the device where there is a mask."""
        model = self._model
        readers = {getattr(getattr(one, "kernel_cache", None), "last_reader", "") for one in self.cache.layers}
        others = {type(layer).__name__ for layer in self.cache.layers if type(layer) is not KVQLayer}
        returned = sorted(name for name, value in output.items() if value is not None and name not in STAYING_OUTPUTS)
        reasons = {
            self.obstacle: self.is_hopeless,
            f"{type(model).__name__} takes no position_ids": not self._takes_positions,
            "the batch is padded": self.cache.has_padding,
            "the mask hides tokens": mask is not None and not bool(mask.all()),
            "the model is compiled": _is_compiled(model, self._forward),
            "the model is in training mode": model.training,
            "autocast": torch.is_autocast_enabled(model.device.type),
            f"the cache has other layers: {', '.join(sorted(others))}": bool(others) or not self.cache.layers,
            f"attention was computed by {', '.join(sorted(readers))}": readers != {READER},
            f"the model returns {', '.join(returned)} too": bool(returned),
            "the model lies on several devices": len({input_ids.device, *(p.device for p in model.parameters())}) > 1,
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    def _record_step(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> None:
        stand_in = RecordedCache(self.cache)
        with torch.inference_mode(False), torch.no_grad():  # tensors that can be written to in any mode
            self._tokens, self._positions = input_ids.clone(), position_ids.clone()
            try:
                with WaitFinder(DEVICE_TYPE):
                    self._call(self._tokens, self._positions, stand_in)  # compiles; no layer notes the token
                stand_in.check_complete()
                _refresh_all(stand_in.steps)
                run = self._keep_logits(stand_in)
                self._replay = self._record(run, input_ids.device)
                _refresh_all(stand_in.steps)
            except _unrecordable() as error:
                _LOG.info("a step of %s is not recorded", type(self._model).__name__, exc_info=True)
                self.obstacle, self._replay = str(error).partition("\n")[0], None
                self.is_hopeless = not isinstance(error, CacheStateError)
                return
        self._steps, self.recordings = stand_in.steps, self.recordings + 1

    def _keep_logits(self, stand_in: RecordedCache) -> Callable[[], None]:
        def run() -> None:
            self._logits = self._call(self._tokens, self._positions, stand_in).logits[:, -1:]

        return run


class _Outputs:
    """Makes outputs like one that the model returned."""

    def __init__(self, output: Any) -> None:
        self._kind = type(output)
        self._fields = {name: value for name, value in output.items() if name != "logits"}

    def __call__(self, *, logits: torch.Tensor) -> Any:
        return self._kind(logits=logits, **self._fields)


def _refresh_all(steps: Mapping[int, FixedStep]) -> None:
    for step in steps.values():
        step.refresh()


def _is_compiled(model: PreTrainedModel, forward: Callable[..., Any]) -> bool:
    return getattr(model, "_compiled_call_impl", None) is not None or hasattr(forward, "_torchdynamo_orig_callable")


def _unrecordable() -> tuple[type[Exception], ...]:
    """Return the errors that end a recording.

    A model waits for the device in the middle of a step, or does with its keys and values what their stand-ins cannot;
    Triton cannot compile a program; or the device has too little memory.
    """
    from triton.errors import TritonError

    return RuntimeError, AttributeError, TypeError, ValueError, LookupError, AssertionError, ImportError, TritonError
