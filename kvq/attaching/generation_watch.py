"""Whether the attention of a model really reads the cache that was attached to it, and why not.

The hook that makes the cache relies on a private name of transformers, and much can come in between. So each `generate`
is watched: until the first forward that had a cache to read, and once more at its end. It must not know how a cache is
attached to a model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvq.attention import ATTENTION_NAME
from kvq.layers.quantized_layer import KVQLayer
from kvq.transformers_seams.private_names import CHECKPOINTS, PREPARE_CACHE, find_cache
from kvq.user_warnings import warn_user

NOT_ASKED = (
    f"generate did not ask for a cache by {PREPARE_CACHE}: the model has a loop of its own, something else took the "
    "place of that method, or this release of transformers has another name for it"
)


class GenerationWatch:
    """One `generate`; belongs to the thread that it runs in.

    Args:
        model: the model that generates.
        tell: is called at most once, with the reason why the cache is not read.
        is_innermost: returns whether forwards belong to this `generate` now; where a model drafts for itself, they
            belong to the `generate` within.
    """

    def __init__(
        self, model: PreTrainedModel, tell: Callable[[str], None], is_innermost: Callable[[GenerationWatch], bool]
    ) -> None:
        self.cache: Any = None
        self._model = model
        self._tell = tell
        self._is_innermost = is_innermost
        self._thread = threading.get_ident()
        self._is_settled = False
        self._was_asked = False
        self._before: tuple[int, ...] = ()
        self._hook: Any = None

    def begin(self) -> None:
        """Look at each forward of the model until the matter is settled."""
        self._hook = self._model.register_forward_hook(self._look, with_kwargs=True)

    def expect(self, cache: Any) -> None:
        """Note the cache that this `generate` is to read."""
        self._was_asked, self.cache = True, cache
        self._before = _versions(cache)
        for layer in _quantized_layers(cache):
            layer.kernel_cache.last_reader = ""

    def settle(self, reason: str | None = None) -> None:
        """Look no further.

        Args:
            reason: why the cache is not read; None where it is, or where the user has chosen another.
        """
        if not self._is_settled and reason is not None:
            self._tell(reason)
        self._is_settled = True
        self._stop()

    def end(self, *, failed: bool) -> None:
        """Settle the matter at the end of the `generate`; one that failed shows nothing."""
        if failed or self._is_settled:
            self._stop()
        elif not self._was_asked:
            self.settle(NOT_ASKED)
        else:
            self.settle(None if self._has_grown() else "no forward of the model was given the cache")

    def _stop(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    # Seen by torch.compile it would become part of the model.
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it unannotated
    def _look(self, _model: Any, arguments: tuple[Any, ...], *rest: Any) -> None:
        """Judge by one forward: its arguments, and whether the cache has grown by it.

        Args:
            arguments: positional ones.
            *rest: the keyword arguments and the output. torch leaves the former out where another thread adds or
                removes a hook of its own at that moment; the next forward tells as well.
        """
        if self._is_settled or threading.get_ident() != self._thread or not self._is_innermost(self) or len(rest) < 2:
            return
        options, output = rest
        if self._was_asked:
            self.settle(self._find_reason(arguments, options))
            return
        other = next((one for one in (find_cache(options), find_cache(output)) if isinstance(one, Cache)), None)
        if other is not None and other.get_seq_length():
            self.settle(NOT_ASKED)

    def _has_grown(self) -> bool:
        """Return whether a quantized layer has taken tokens since the cache was expected."""
        return _versions(self.cache) != self._before

    def _find_reason(self, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> str | None:
        if self._has_grown():
            if not _is_read(self.cache):
                warn_user(
                    f"{type(self._model).__name__} does not hand the keys of the attached cache to transformers' "
                    "attention: each operation on them dequantizes the layer"
                )
            return None
        given = find_cache(options)
        if given is None:
            given = next((one for one in arguments if isinstance(one, Cache)), None)
        if given is not None and given is not self.cache:
            return f"the first forward was given a {type(given).__name__} in its place, as prefix tuning does"
        if self._model.training and any(getattr(part, CHECKPOINTS, False) for part in self._model.modules()):
            return "gradient checkpointing in training mode takes the cache from the layers; call model.eval()"
        if options.get("use_cache") is False:
            return "use_cache=False"
        if given is None:
            return "the first forward was not given the cache"
        return f"{type(self._model).__name__} was given the cache, but put nothing into it"


def _versions(cache: Any) -> tuple[int, ...]:
    """Return numbers that change with what the quantized layers hold."""
    return tuple(layer.kernel_cache.version for layer in _quantized_layers(cache))


def _is_read(cache: Any) -> bool:
    """Return whether our attention has read a layer, wherever it is the active one."""
    active = getattr(cache, "self_attention_cache", cache).attention_detector.name
    return active != ATTENTION_NAME or any(layer.kernel_cache.last_reader for layer in _quantized_layers(cache))


def _quantized_layers(cache: Any) -> list[KVQLayer]:
    return [layer for layer in cache.layers if isinstance(layer, KVQLayer)]
