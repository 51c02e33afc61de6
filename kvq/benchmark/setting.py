"""The conditions of a measurement: shapes, lengths, dtypes, and the states, equal for every cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, PretrainedConfig

from kvq.errors import EvaluationError

POSITIONS = 1 << 20
"""Positions of the random models; more than any run needs."""
CHANNEL_OFFSET = 2.0
"""Spread of the means of the key channels, in standard deviations: real keys are not centred either."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def find_dtype(name: str) -> torch.dtype:
    """Return the dtype of that name.

    Raises:
        EvaluationError: states do not have such a dtype.
    """
    if name not in DTYPES:
        raise EvaluationError(f"dtype {name!r} is not accepted: {', '.join(DTYPES)}")
    return DTYPES[name]


@dataclass(frozen=True)
class Shape:
    """The shape of a random model; the layer runs measure one layer of it.

    Attributes:
        layers: number of decoder layers.
        query_heads: number of query heads (Hq).
        heads: number of key-value heads (H).
        head_dim: elements of one head (D).
        hidden_size: width of the residual stream.
        intermediate_size: width of the feed-forward part.
        vocabulary: number of tokens.
    """

    layers: int = 1
    query_heads: int = 32
    heads: int = 8
    head_dim: int = 128
    hidden_size: int = 1024
    intermediate_size: int = 2048
    vocabulary: int = 1024

    @classmethod
    def of(cls, config: PretrainedConfig) -> Shape:
        """Return the shape of a model of transformers.

        Raises:
            EvaluationError: a layer of it does not attend to all tokens, as the baselines do.
        """
        config = config.get_text_config(decoder=True)
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise EvaluationError(
                f"{type(config).__name__} has layers of kind {', '.join(sorted(kinds))}; the benchmark serves models "
                "whose layers all attend to all tokens"
            )
        heads = config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            query_heads=heads,
            heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            hidden_size=config.hidden_size,
            intermediate_size=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            vocabulary=config.vocab_size,
        )

    def config(self, attention: str = "sdpa") -> LlamaConfig:
        """Return the configuration of a model with this shape and attention implementation."""
        config = LlamaConfig(
            num_hidden_layers=self.layers,
            num_attention_heads=self.query_heads,
            num_key_value_heads=self.heads,
            head_dim=self.head_dim,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            vocab_size=self.vocabulary,
            max_position_embeddings=POSITIONS,
        )
        config._attn_implementation = attention
        return config

    @classmethod
    def deep(cls, layers: int) -> Shape:
        """Return a shape whose layers compute so little that the cache's other work shows in a step."""
        return cls(layers, query_heads=4, heads=2, head_dim=64, hidden_size=64, intermediate_size=64)


@dataclass(frozen=True)
class Setting:
    """One set of conditions.

    Attributes:
        shape: shape of the layer or model.
        length: tokens of history.
        batch: rows (B).
        dtype: dtype of the states.
        device: device of model, states and caches.
    """

    shape: Shape
    length: int
    batch: int
    dtype: torch.dtype
    device: torch.device

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return self.batch * self.length

    @property
    def states_bytes(self) -> int:
        """Bytes of keys and values of the history in full precision, all layers."""
        shape = self.shape
        return 2 * shape.layers * self.tokens * shape.heads * shape.head_dim * self.dtype.itemsize

    def history(self, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values `[B, H, length, D]` of a layer; the same at every call."""
        generator = torch.Generator(self.device).manual_seed(layer_idx)
        offsets = CHANNEL_OFFSET * self._random((1, self.shape.heads, 1, self.shape.head_dim), generator)
        keys = self.new_states(self.length, generator).add_(offsets)
        return keys, self.new_states(self.length, generator)

    def new_states(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Return random states `[B, H, count, D]`."""
        return self._random((self.batch, self.shape.heads, count, self.shape.head_dim), generator)

    def new_query(self, generator: torch.Generator) -> torch.Tensor:
        """Return a random query `[B, Hq, 1, D]`."""
        return self._random((self.batch, self.shape.query_heads, 1, self.shape.head_dim), generator)

    def _random(self, size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=self.dtype, device=self.device)

    def to_dict(self) -> dict[str, object]:
        """Return plain values."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"length": self.length, "batch": self.batch, "dtype": dtype}
