"""Steps at fixed addresses by Triton's interpreter, beside a layer that takes the same tokens; prints what was seen.

A process of its own with TRITON_INTERPRET=1, since that is read when the programs are imported.
"""

from __future__ import annotations

import json

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from kvq import KVQ
from kvq.attention.dispatch.request import AttentionRequest
from kvq.attention.kernels.eager.kernel import REFERENCE
from kvq.attention.proving.comparison import relative_difference
from kvq.errors import CacheStateError
from kvq.layers.fixed_step import FixedStep

BATCH, HEADS, QUERY_HEADS, HEAD_DIM = 1, 1, 2, 64
PROMPT, STEPS, ROOM = 150, 76, 256
SCALING = HEAD_DIM**-0.5
STAYING = (
    *("key_table", "value_table", "stored_length", "window_key", "window_value", "sink_key", "sink_value", "starts"),
    "window_length",
)
"""What a launch reads at addresses that a capture would keep."""


class Operations(TorchDispatchMode):
    """Notes the operations of torch."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


class Launched:
    """A program that notes what it is launched with; what the interpreter does is not noted."""

    def __init__(self, program, noted):
        self.program, self.noted = program, noted

    def __getitem__(self, grid):
        def launch(*given, **named):
            names = [name for name in self.program.arg_names if name not in named]
            values = dict(zip(names, given, strict=True))
            staying = {name: values[name].data_ptr() for name in STAYING if name in values}
            numbers = {name: one for name, one in values.items() if not isinstance(one, torch.Tensor)}
            self.noted.add(json.dumps([grid, staying, numbers, {key: str(one) for key, one in named.items()}]))
            with _disable_current_modes():
                self.program[grid](*given, **named)

        return launch


def draw(generator, heads):
    return torch.randn(BATCH, heads, 1, HEAD_DIM, generator=generator)


def main():
    from kvq.attention.kernels.triton import programs

    noted = {name: set() for name in ("attend_parts", "combine")}
    for name, launches in noted.items():
        setattr(programs, name, Launched(getattr(programs, name), launches))
    generator = torch.Generator().manual_seed(3)
    cache = KVQ(backend="native", nbits_k=4, nbits_v=4, sink_length=4, residual_length=32)
    history = torch.randn(2, BATCH, HEADS, PROMPT, HEAD_DIM, generator=generator)
    cache.update(*history, 0)
    layer, operations, errors, runs, refreshes = cache.layers[0], Operations(), [], 0, 0
    twin = layer.fork()
    step = FixedStep(layer, draw(generator, QUERY_HEADS), SCALING, ROOM)
    for _ in range(STEPS):
        query, key, value = (draw(generator, heads) for heads in (QUERY_HEADS, HEADS, HEADS))
        pair = twin.update(key, value, packed=True)[0].pair
        expected = REFERENCE.attend(AttentionRequest(query, pair, None, SCALING))
        if not step.may_run():
            layer.update(key, value, packed=True)
            step.refresh()
            refreshes += 1
            continue
        with operations:
            output = step.run(query, key, value)
        step.note_run()
        runs += 1
        errors.append(relative_difference(output, expected))
    same = [own.equal(other) for own, other in zip(layer.materialize(), twin.materialize(), strict=True)]
    layer.crop(-1)
    seen = {"error": max(errors), "runs": runs, "refreshes": refreshes, "same": same, "after a crop": step.may_run()}
    outgrown = None
    try:
        while True:
            layer.update(*history[:, :, :, :64], packed=True)
            step.refresh()
    except CacheStateError as error:
        outgrown = str(error)
    print(json.dumps({**seen, "launches": {name: len(one) for name, one in noted.items()}, "outgrown": outgrown,
                      "operations": sorted(operations.names)}))  # fmt: skip


if __name__ == "__main__":
    main()
