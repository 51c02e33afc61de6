"""One contender with its history in place: a layer or a whole model, ready to take steps."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from kvq.attention.handle import PackedStates
from kvq.benchmark.baselines import packed_attention_forward
from kvq.benchmark.contenders import Contender
from kvq.benchmark.setting import Setting
from kvq.layers.quantized_layer import KVQLayer
from kvq.transformers_seams.private_names import pass_cache


class Trial(ABC):
    """A contender under one setting.

    Attributes:
        contender: the cache and the attention that reads it.
        setting: the conditions.
        spare: tokens that will follow the history.
        cache: holds the history once `fill` has run.
    """

    def __init__(self, contender: Contender, setting: Setting, spare: int) -> None:
        self.contender = contender
        self.setting = setting
        self.spare = spare
        self.cache = contender.build(self.config, setting.length + spare)
        for layer in self._quantized_layers():
            layer.kernel_cache.wanted = contender.kernel

    @property
    def config(self) -> PretrainedConfig:
        """Configuration of the model that the cache is built for."""
        return self.setting.shape.config(self.contender.attention)

    def fill(self) -> None:
        """Hand the history to the cache, layer by layer."""
        for layer_idx in range(self.setting.shape.layers):
            self.cache.update(*self.setting.history(layer_idx), layer_idx)

    def extend(self, count: int) -> None:
        """Add `count` random tokens, as one update."""
        generator = torch.Generator(self.setting.device).manual_seed(count)
        for layer_idx in range(self.setting.shape.layers if count else 0):
            states = (self.setting.new_states(count, generator) for _ in range(2))
            self.cache.update(*states, layer_idx)

    @abstractmethod
    def prepare(self, seed: int) -> None:
        """Draw the input of the next step; it is the same for every contender with the same seed."""

    @abstractmethod
    def step(self) -> torch.Tensor:
        """Decode one token."""

    @property
    def kernel(self) -> str:
        """Name of the kernel that last read the first quantized layer; empty if none read it packed."""
        layers = self._quantized_layers()
        return layers[0].kernel_cache.last_reader if layers else ""

    def _quantized_layers(self) -> list[KVQLayer]:
        return [layer for layer in self.cache.layers if isinstance(layer, KVQLayer)]

    def find_error(self) -> float | None:
        """Return the distance of a step from dequantize-then-attend; None if the step does just that."""
        return None


class LayerTrial(Trial):
    """One attention layer: a new key and value go into the cache, a query attends to all."""

    def __init__(self, contender: Contender, setting: Setting, spare: int) -> None:
        super().__init__(contender, setting, spare)
        self.module = _AttentionModule(setting.shape.query_heads // setting.shape.heads)
        self.attend = AttentionInterface()[contender.attention]
        self.prepare(0)

    def prepare(self, seed: int) -> None:
        """Draw query, key and value of the next token."""
        generator = torch.Generator(self.setting.device).manual_seed(seed)
        self.query = self.setting.new_query(generator)
        self.key, self.value = (self.setting.new_states(1, generator) for _ in range(2))

    def step(self) -> torch.Tensor:
        """Return the attention output `[B, 1, Hq, D]`."""
        return self._attend(*self.cache.update(self.key, self.value, 0))

    def find_error(self) -> float | None:
        """Return the largest relative difference from attention in float32 over the dequantized states."""
        keys, values = self.cache.update(self.key, self.value, 0)
        if not isinstance(keys, PackedStates) or not isinstance(values, PackedStates):
            return None
        output = self._attend(keys, values).float()
        full_keys, full_values = keys.materialize().float(), values.materialize().float()
        query, scaling = self.query.float(), self.setting.shape.head_dim**-0.5
        expected = packed_attention_forward(self.module, query, full_keys, full_values, None, scaling=scaling)[0]
        return float((output - expected).abs().max() / expected.abs().max())

    def _attend(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        options = {"dropout": 0.0, "scaling": self.setting.shape.head_dim**-0.5}
        output: torch.Tensor = self.attend(self.module, self.query, keys, values, None, **options)[0]
        return output


class ModelTrial(Trial):
    """A whole model: a forward of `width` tokens for each row, one unless set; the last `rejected` are taken back.

    Args:
        contender: the cache and the attention that reads it.
        setting: the conditions.
        spare: tokens that will follow the history.
        model: the model; its attention is changed to the contender's at each of its turns.
        reads_prompt: whether the model reads random tokens to make the history; else it is made of random states, which
            needs no prefill.
    """

    def __init__(
        self, contender: Contender, setting: Setting, spare: int, model: PreTrainedModel, *, reads_prompt: bool = False
    ) -> None:
        self.model = model
        self.reads_prompt = reads_prompt
        self.width, self.rejected = 1, 0
        super().__init__(contender, setting, spare)
        self.prepare(0)

    @property
    def config(self) -> PretrainedConfig:
        """The model's own configuration, which has the contender's attention only during its turn."""
        return self.model.config

    def fill(self) -> None:
        """Let the model read the history, or hand random states to the cache."""
        if not self.reads_prompt:
            super().fill()
            return
        self.model.set_attn_implementation(self.contender.attention)
        size = (self.setting.batch, self.setting.length)
        tokens = torch.randint(self.setting.shape.vocabulary, size, generator=torch.Generator().manual_seed(0))
        self.model(
            tokens.to(self.setting.device), use_cache=True, logits_to_keep=1, **pass_cache(self.model, self.cache)
        )

    def prepare(self, seed: int) -> None:
        """Draw the next tokens and give the model the contender's attention."""
        generator = torch.Generator("cpu").manual_seed(seed)
        size = (self.setting.batch, self.width)
        tokens = torch.randint(self.setting.shape.vocabulary, size, generator=generator)
        self.tokens = tokens.to(self.setting.device)
        self.model.set_attn_implementation(self.contender.attention)

    def step(self) -> torch.Tensor:
        """Return the logits `[B, 1, vocabulary]`."""
        output = self.model(self.tokens, use_cache=True, logits_to_keep=1, **pass_cache(self.model, self.cache))
        logits: torch.Tensor = output.logits
        if self.rejected:
            self.cache.crop(-self.rejected)
        return logits


class _AttentionModule(nn.Module):
    """The attributes of a model's attention module that attention functions read."""

    is_causal = True
    layer_idx = 0

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups
        self.eval()
