"""Is the kernel right on this device, at every width and kind of shape? Compared with the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kvq.attention.dispatch.kernel import Kernel
from kvq.attention.kernels.eager.kernel import REFERENCE
from kvq.attention.proving.comparison import TOLERANCE, relative_difference
from kvq.attention.proving.samples import Sample
from kvq.attention.proving.trial import CHECKS, TIMED
from kvq.plugin_api.granularity import Granularity
from kvq.watcher import Watcher

_CHANNEL, _TOKEN = Granularity.PER_CHANNEL, Granularity.PER_TOKEN
_HALF = (torch.bfloat16,) * 3
_AS_STORED_BY_DEFAULT = Sample(
    dtypes=_HALF, group_size=64, head_dim=128, axes=(_CHANNEL, _CHANNEL), is_rotated=True, balanced=(True, True)
)

WIDTHS = tuple(
    replace(base, bits=(bits, bits))
    for bits in range(1, 9)
    for base in (
        _AS_STORED_BY_DEFAULT,
        replace(_AS_STORED_BY_DEFAULT, metadata=torch.int8),
        Sample(dtypes=_HALF, group_size=64, head_dim=128, axes=(_CHANNEL, _TOKEN)),
        Sample(dtypes=_HALF, group_size=64, head_dim=128, axes=(_TOKEN, _TOKEN)),
        Sample(group_size=64, head_dim=128, axes=(_CHANNEL, _TOKEN)),
    )
)
"""Every width, in the ways that codes and metadata lie."""
SHAPES = (
    *(replace(_AS_STORED_BY_DEFAULT, head_dim=head_dim, group_size=32) for head_dim in (64, 80, 96, 128, 256)),
    *(replace(_AS_STORED_BY_DEFAULT, sharing=sharing) for sharing in (1, 2, 8, 16)),
    *(replace(_AS_STORED_BY_DEFAULT, batch=batch, mask="bool", sinks=3) for batch in (1, 3)),
    replace(_AS_STORED_BY_DEFAULT, queries=5),
    replace(_AS_STORED_BY_DEFAULT, queries=5, batch=2, mask="bool"),
    replace(_AS_STORED_BY_DEFAULT, softcap=5.0, has_logits=True),
    replace(_AS_STORED_BY_DEFAULT, batch=3, is_reordered=True),
    replace(_AS_STORED_BY_DEFAULT, stored=5000),
    replace(_AS_STORED_BY_DEFAULT, dtypes=(torch.float16,) * 3),
)
"""Every kind of shape, at four bits."""
SAMPLES = (*WIDTHS, *SHAPES, TIMED, *CHECKS)


@dataclass(frozen=True)
class Comparison:
    """One request that the kernel served.

    Attributes:
        sample: the kind of request.
        error: the largest difference from the reference, as a share of the largest output.
        tolerance: the largest that is accepted.
    """

    sample: Sample
    error: float
    tolerance: float

    @property
    def is_right(self) -> bool:
        """Whether the difference is rounding."""
        return self.error <= self.tolerance


def compare_all(
    kernel: Kernel, device: torch.device, watcher: Watcher, samples: Sequence[Sample] = SAMPLES
) -> list[Comparison]:
    """Compare the kernel with the reference on every sample that it serves."""
    found = []
    watcher.begin("comparing with the reference", len(samples), "requests")
    for number, sample in enumerate(samples):
        watcher.advance("comparing with the reference")
        request = sample.build(device, seed=number)
        if kernel.why_unsupported(request) is not None:
            continue
        error = relative_difference(kernel.attend(request), REFERENCE.attend(request))
        found.append(Comparison(sample, error, TOLERANCE[request.query.dtype]))
    return found
