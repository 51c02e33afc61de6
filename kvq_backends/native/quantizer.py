"""Round-to-nearest with torch alone, as an affine quantizer.

Owns the choice of a line for each group, and the arithmetic that keeps it right from denormal ranges to ranges past the
largest fp32. Nothing depends on the order of a reduction: a group gets the same bits in any batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvq.plugin_api import AffineQuantizer

_LARGEST = torch.finfo(torch.float32).max

_LEAST_UNIT = 2.0**-126
"""The smallest unit: a normal number, to keep the division by it exact."""

_LEAST_SHRINK = 0.2
"""The narrowest range that is tried, relative to the one between the extremes."""

_LEAST_GAIN = 2.0**-10
"""A line must lower the squared error by this part of it: less could be rounding, even at 8 bits."""

_NEGLIGIBLE_ERROR = 2.0**-22
"""Mean squared error, in squared ranges, below which rounding blurs comparisons; 8 bits usually have 5 times that."""

_REFITS = 2
"""Least-squares passes after the search."""


class NativeQuantizer(AffineQuantizer):
    """Round to nearest between the extremes of each group, or between clipped ones.

    Args:
        nbits: 1 to 8.
        clip_candidates: how many narrower ranges are tried. 0: the extremes as they are; then no error exceeds half a
            step, and the extremes come back exactly, up to the rounding of fp32.
    """

    group_local = True

    def __init__(self, nbits: int, *, clip_candidates: int = 0) -> None:
        self.largest_code = 2**nbits - 1
        self.clip_candidates = clip_candidates
        self.rounds_to_nearest = not clip_candidates

    def encode(self, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Quantize groups: `x ~ scale * code + offset`.

        Args:
            groups: fp32 `[..., G]`, finite, any device; not written to, and not aliased by the results.

        Returns:
            codes: uint8 `[..., G]`, below `2 ** nbits`.
            scale: fp32 `[...]`, finite; 0 for a constant group only.
            offset: fp32 `[...]`, finite.
        """
        frame = Frame.of(groups.detach().contiguous(), self.largest_code)
        line = frame.line_between(1.0)
        if self.clip_candidates:
            line = search_line(frame, line, self.clip_candidates)
        return frame.find_codes(line).to(torch.uint8), line.scale.squeeze(-1), line.offset.squeeze(-1)


@dataclass(frozen=True)
class Line:
    """Levels `scale * code + offset`; both fp32 `[..., 1]` and finite."""

    scale: torch.Tensor
    offset: torch.Tensor


@dataclass(frozen=True)
class Frame:
    """Groups as `(x - low) / unit`, where no difference overflows and no square of one underflows.

    Attributes:
        rows: the groups, fp32 `[..., G]`, from 0 to `extent`.
        extent: fp32 `[..., 1]`, 0 or from 2 ** -23 to 4; from 1 to 2 but for denormal and enormous ranges.
        start: the least element in units, fp32 `[..., 1]`.
        unit: a power of two, fp32 `[..., 1]`.
        largest_code: levels less one.
    """

    rows: torch.Tensor
    extent: torch.Tensor
    start: torch.Tensor
    unit: torch.Tensor
    largest_code: int

    @classmethod
    def of(cls, groups: torch.Tensor, largest_code: int) -> Frame:
        """Return the frame of groups fp32 `[..., G]`, which it does not alias."""
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)  # aminmax is 10 times slower on a CPU
        # A constant group has no range of its own; other ranges are never that small beside their numbers.
        bounded = torch.maximum(high - low, low.abs() * 2.0**-24).clamp(_LEAST_UNIT, _LARGEST)
        unit = bounded / (2 * torch.frexp(bounded).mantissa)
        start = low / unit
        return cls((groups / unit).sub_(start), high / unit - start, start, unit, largest_code)

    def line_between(self, shrink: float) -> Line:
        """Return the line through the middle `shrink` of the range, a fraction of it."""
        return self.make_line(self.extent * shrink / self.largest_code, self.extent * ((1 - shrink) / 2))

    def fit_line(self, line: Line) -> Line:
        """Return the least-squares line for the codes of `line`, or `line` where these are all equal."""
        codes = self.find_codes(line)
        length = codes.shape[-1]
        mean_code, mean = sum_pairwise(codes) / length, sum_pairwise(self.rows) / length
        codes = codes.sub_(mean_code)
        covariance = sum_pairwise((self.rows - mean).mul_(codes))
        variance = sum_pairwise(codes.square_())
        varies = variance > 0
        step = covariance / variance.masked_fill(~varies, 1)
        return choose_lines(varies, self.make_line(step, mean - step * mean_code), line)

    def make_line(self, step: torch.Tensor, start: torch.Tensor) -> Line:
        """Return the line with levels `step * code + start` in this frame; both fp32 `[..., 1]`."""
        scale = step * self.unit
        # Among denormal numbers a scale that was rounded down would leave the top of the range out of reach.
        scale = torch.where(scale / self.unit < step, torch.nextafter(scale, torch.full_like(scale, _LARGEST)), scale)
        offset = (self.start + start) * self.unit
        return Line(scale.clamp(max=_LARGEST), offset.clamp(-_LARGEST, _LARGEST))

    def find_codes(self, line: Line) -> torch.Tensor:
        """Return the nearest codes as fp32 `[..., G]`, the caller's own."""
        step = line.scale / self.unit
        distances = self.rows - self._find_start(line)
        return distances.div_(step.masked_fill(step == 0, 1)).round_().clamp_(0, self.largest_code)

    def measure_error(self, line: Line) -> torch.Tensor:
        """Return the squared error of each group, fp32 `[..., 1]`, in squared units."""
        values = self.find_codes(line).mul_(line.scale / self.unit).add_(self._find_start(line))
        return sum_pairwise(values.sub_(self.rows).square_())

    def _find_start(self, line: Line) -> torch.Tensor:
        return line.offset / self.unit - self.start


def search_line(frame: Frame, line: Line, candidates: int) -> Line:
    """Return for each group the line with the least squared error.

    Narrower and narrower ranges around the middle are tried, one after another over all groups. Then least squares fit
    a line to the winner's codes: both ends of the range move independently, and the mean error vanishes.

    Args:
        frame: the groups.
        line: the one to beat; a group that it serves almost exactly keeps it.
        candidates: how many narrower ranges are tried.
    """
    error = frame.measure_error(line)
    negligible = _NEGLIGIBLE_ERROR * frame.rows.shape[-1] * frame.extent.square()
    error = error.masked_fill(error <= negligible, 0)
    for number in range(1, candidates + 1):
        shrink = 1 - (1 - _LEAST_SHRINK) * number / candidates
        line, error = _keep_better(frame, line, error, frame.line_between(shrink))
    for _ in range(_REFITS):
        line, error = _keep_better(frame, line, error, frame.fit_line(line))
    return line


def _keep_better(frame: Frame, line: Line, error: torch.Tensor, other: Line) -> tuple[Line, torch.Tensor]:
    """Return the better of two lines for each group, and its squared error."""
    other_error = frame.measure_error(other)
    is_better = other_error < error * (1 - _LEAST_GAIN)
    return choose_lines(is_better, other, line), torch.where(is_better, other_error, error)


def choose_lines(condition: torch.Tensor, line: Line, other: Line) -> Line:
    """Return `line` for the groups where bool `[..., 1]` is True, else `other`."""
    scale = torch.where(condition, line.scale, other.scale)
    return Line(scale, torch.where(condition, line.offset, other.offset))


def sum_pairwise(values: torch.Tensor) -> torch.Tensor:
    """Return sums along the last dimension of `[..., G]` as `[..., 1]`.

    `torch.sum` adds in an order that depends on the shape of the batch; here it depends on G alone.
    """
    while (length := values.shape[-1]) > 1:
        half = length // 2
        folded = values[..., :half] + values[..., half : 2 * half]
        if length % 2:
            folded[..., -1:] += values[..., -1:]
        values = folded
    return values
