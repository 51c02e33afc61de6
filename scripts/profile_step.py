"""Where the time of a decode step goes that a quantized layer takes beside the model: the table of docs/speed.md.

Each row is the least of many timings, so it holds on a machine that has other work too. Parts are timed alone, with
warm caches of the processor; in a model, whose weights push them out, all of them take longer.
"""

from __future__ import annotations

import argparse
import timeit
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn
from transformers import LlamaConfig

from kvq import KVQ
from kvq.attention.entry import kvq_attention_forward
from kvq.attention.kernels.compiled import kernel as compiled
from kvq.layers.quantized_layer import KVQLayer

ROUNDS = 400
CALLS = 5


def main() -> None:
    """Print the microseconds of each part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=256, help="tokens of history")
    parser.add_argument("--dtype", default="float32", help="dtype of the states")
    parser.add_argument("--backend", default="native", help="backend, at 4 bits for both sides")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        parts = Step(asked.tokens, getattr(torch, asked.dtype), asked.backend).profile()
    for name, microseconds in parts.items():
        print(f"| {name} | {microseconds:.0f} |")


class Step:
    """A step of one layer in the shape of SmolLM2: 9 query heads, 3 key-value heads, head dim 64."""

    def __init__(self, tokens: int, dtype: torch.dtype, backend: str) -> None:
        config = LlamaConfig(
            num_hidden_layers=1, num_attention_heads=9, num_key_value_heads=3, head_dim=64, hidden_size=576,
            vocab_size=9, attn_implementation="kvq",
        )  # fmt: skip
        self.module, self.dtype = nn.Module(), dtype
        self.module.config = config
        self.cache = KVQ(backend=backend, nbits_k=4, nbits_v=4, model=config)
        self.layer: KVQLayer = self.cache.layers[0]
        self.layer.kernel_cache.wanted = "compiled"
        self.cache.update(self.draw(3, tokens), self.draw(3, tokens), 0)
        self.query, self.token = self.draw(9, 1), self.draw(3, 1)
        self.cache.update(self.token, self.token, 0)  # leaves room in the window, as after nearly every token

    def draw(self, heads: int, tokens: int) -> torch.Tensor:
        """Return states as models hand them over: views of what lies token by token."""
        return torch.randn(1, tokens, heads, 64, dtype=self.dtype).transpose(1, 2)

    def profile(self) -> dict[str, float]:
        """Return the microseconds of each part; nothing is quantized meanwhile but in the last."""
        sides = [side for _, side in self.layer.sides()]
        held = [side.contents for side in sides]

        def undo() -> None:
            for side, contents in zip(sides, held, strict=True):
                side.contents = contents

        def append(flush_count: int = 0) -> None:
            for side in sides:
                side.append(self.token if not flush_count else block, flush_count)
            undo()

        def update() -> None:
            self.cache.update(self.token, self.token, 0)
            undo()

        block = self.draw(3, self.layer.flush_length)
        keys, values = self.cache.update(self.token, self.token, 0)
        undo()

        def attend() -> None:
            kvq_attention_forward(self.module, self.query, keys, values, None, scaling=0.125, dropout=0.0)

        whole = best_of(attend)
        around = self._without_kernel(attend)
        self.layer.kernel_cache.note_growth()
        checks = best_of(lambda: self.layer.check_states(self.token, self.token))
        copies, updates = best_of(append), best_of(update)
        handles = best_of(keys.pair.handles)
        return {
            "update: checks of the states": checks,
            "update: keys and values into the window": copies,
            "update: handles": handles,
            "update: the rest": updates - checks - copies - handles,
            "attention: all but the kernel": around,
            "attention: the kernel": whole - around,
            "a flush, every 64 steps": best_of(lambda: append(self.layer.flush_length)),
        }

    def _without_kernel(self, attend: Callable[[], None]) -> float:
        """Return the time of attention whose compiled code returns at once."""
        library = compiled.get_library
        nothing = replace(library(), attend=lambda _place: 0)
        compiled.get_library = lambda: nothing
        try:
            return best_of(attend)
        finally:
            compiled.get_library = library


def best_of(call: Callable[[], object]) -> float:
    """Return the microseconds of a call, the least of `ROUNDS` means."""
    call()
    return min(timeit.repeat(call, number=CALLS, repeat=ROUNDS)) / CALLS * 1e6


if __name__ == "__main__":
    main()
