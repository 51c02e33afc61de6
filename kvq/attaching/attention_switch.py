"""Which configurations read the "kvq" attention because a cache is attached, and what they read before.

Models may share a configuration or a part: it gets its own attention back when the last attachment ends, in any order.
It must not know what a cache is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedModel

from kvq.attention import ATTENTION_NAME
from kvq.transformers_seams.private_names import restore_attention
from kvq.user_warnings import warn_user


@dataclass
class SwitchedConfig:
    """One configuration while a cache is attached to a model that reads it.

    Attributes:
        config: the model's own object.
        before: the implementation that it gets back.
        holders: number of attachments that need ours.
    """

    config: PretrainedConfig
    before: str | None
    holders: int = 0


class AttentionSwitch:
    """Turns the attention of one model to ours; one for each attachment.

    Args:
        model: the model; nothing is changed yet.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._configs = list_configs(model)

    def turn_on(self) -> None:
        """Let the model attend by "kvq"; warn where it does not take another attention."""
        for config in self._configs:
            held = _SWITCHED.setdefault(id(config), SwitchedConfig(config, config._attn_implementation))
            held.holders += 1
        try:
            self._model.set_attn_implementation(ATTENTION_NAME)
        except BaseException:
            self.turn_off()
            raise
        if all(config._attn_implementation != ATTENTION_NAME for config in self._configs):
            warn_user(
                f"{type(self._model).__name__} keeps its attention {self._model.config._attn_implementation!r}, since "
                "its layers do not ask transformers for the function to attend by: the cache is quantized, but "
                "dequantized layer by layer at every step"
            )

    def turn_off(self) -> None:
        """Give back the attention of every configuration that no other attachment needs."""
        for config in self._configs:
            held = _SWITCHED[id(config)]
            held.holders -= 1
            if not held.holders:
                if config._attn_implementation == ATTENTION_NAME:  # else the user has chosen another one meanwhile
                    restore_attention(config, held.before)
                del _SWITCHED[id(config)]

    def switched(self) -> Sequence[SwitchedConfig]:
        """Return the configurations that are turned to ours now, with what they read before."""
        return [_SWITCHED[id(config)] for config in self._configs if id(config) in _SWITCHED]


def list_configs(model: PreTrainedModel) -> list[PretrainedConfig]:
    """Return every configuration whose attention `set_attn_implementation` may change."""
    found: dict[int, PretrainedConfig] = {}
    waiting = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    while waiting:
        config = waiting.pop()
        if id(config) not in found:
            found[id(config)] = config
            waiting += [sub for name in config.sub_configs if (sub := getattr(config, name, None)) is not None]
    return list(found.values())


_SWITCHED: dict[int, SwitchedConfig] = {}
"""By the identity of the configuration, which the entry keeps alive."""
