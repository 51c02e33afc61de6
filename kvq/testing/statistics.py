"""The check of what a backend makes of the statistics of a model."""

from __future__ import annotations

import torch

from kvq.calibration import Calibration
from kvq.config.field_types import SIDES
from kvq.errors import CheckNotApplicableError
from kvq.plugin_api.quantizer import Quantizer, Side
from kvq.plugin_api.statistics import LayerStatistics
from kvq.testing.case import HEAD_DIM, ContractCase, encode_blocks, require

NUM_HEADS = 2
"""Key-value heads of the states of a case."""


def check_calibration(case: ContractCase) -> None:
    """Statistics of any model do, and none where they are optional; they change no layout and are not written to."""
    if case.backend.calibration == "unused":
        raise CheckNotApplicableError("it asks for no statistics")
    for side in SIDES:
        own = _uneven_statistics(side)
        before = {name: tensor.clone() for name, tensor in vars(own).items() if tensor is not None}
        quantizer = case.quantizer(side, calibration=Calibration({(0, side): own}))
        _check_reading(case, quantizer, side)
        layouts = [dict(quantizer.layout()), dict(case.quantizer(side).layout())]
        if case.backend.calibration == "optional":
            layouts.append(dict(case.quantizer(side, calibration=None).layout()))
        require(
            all(layout == layouts[0] for layout in layouts),
            f"the layout of the {side}s depends on the statistics; bytes are planned without them",
        )
        changed = sorted(name for name, tensor in before.items() if not torch.equal(tensor, getattr(own, name)))
        require(not changed, f"{', '.join(changed)} of the {side}s' statistics was written to; make a copy first")


def _check_reading(case: ContractCase, quantizer: Quantizer, side: Side) -> None:
    states = case.states(2 * quantizer.block_length)
    restored = torch.empty_like(states)
    quantizer.decode_into(encode_blocks(quantizer, states), restored)
    require(
        restored.isfinite().all(),
        f"with statistics of other states than it is given, {side}s come back with numbers that are not finite",
    )


def _uneven_statistics(side: Side) -> LayerStatistics:
    """Return statistics whose channels differ, in size and between the heads, and are correlated."""
    generator = torch.Generator().manual_seed(1)
    spread = 2.0 ** (torch.arange(HEAD_DIM) % 5 - 2) * torch.tensor([[1.0], [0.5]])
    mixing = torch.randn(NUM_HEADS, HEAD_DIM, HEAD_DIM, generator=generator) * spread[..., None] / HEAD_DIM**0.5
    moment = mixing @ mixing.mT
    mean = torch.zeros(NUM_HEADS, HEAD_DIM)
    return LayerStatistics(moment, mean, -4 * spread, 4 * spread, moment.flip(-1, -2) if side == "key" else None)
