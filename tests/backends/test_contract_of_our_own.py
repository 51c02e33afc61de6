"""The contract kit on the backends that ship with kvq; `kvq check NAME` runs it on every width and direction."""

from __future__ import annotations

import pytest

from kvq.errors import CheckNotApplicableError
from kvq.testing import CHECKS, BoundCheck, list_checks

BACKENDS = ("hqq", "native", "quanto")
AT_ALL_WIDTHS = {"check_accuracy", "check_codes"}
"""Checks that see a width and cost little."""
ONCE = {
    "check_constant_bytes",
    "check_fused_attention",
    "check_generation",
    "check_honest_bytes",
    "check_light_import",
}
"""Checks that take a second or more; a process that imports the plugin knows no direction."""


def choose_checks(backend: str) -> list[BoundCheck]:
    """Return each check at some width in both directions, or in one; neighbours in the kit see different widths."""
    chosen = []
    for place, check in enumerate(CHECKS):
        bound = list_checks(backend, only=[check.__name__])
        if check.__name__ not in AT_ALL_WIDTHS:
            bound = choose_cases(bound, place, both=check.__name__ not in ONCE)
        chosen += bound
    return chosen


def choose_cases(bound: list[BoundCheck], place: int, *, both: bool) -> list[BoundCheck]:
    """Return one case for each direction, or for one of them in turn."""
    directions = sorted({one.case.granularity for one in bound})
    kept = directions if both else [directions[place % len(directions)]]
    widths = [[one for one in bound if one.case.granularity is direction] for direction in kept]
    return [cases[(place + turn) % len(cases)] for turn, cases in enumerate(widths)]


SEARCHED = {"check_accuracy", "check_more_bits"}
"""Checks that encode so much that HQQ's search takes seconds; some widths suffice from edit to edit."""


def marks_of(backend: str, check: BoundCheck) -> tuple[pytest.MarkDecorator, ...]:
    """Return the marks of a check: costly are processes that import a vendor's library, and most of HQQ's searches."""
    imports_vendor = check.name == "check_light_import" and backend != "native"
    searches = check.name in SEARCHED and backend == "hqq" and check.case.nbits not in (2, 4)
    return (pytest.mark.costly,) if imports_vendor or searches else ()


LEFT_OUT = {
    "check_calibration": "asks for no statistics",
    "check_defaults": "proposes nothing",
    "check_fused_scores": "leaves attention to the core",
}
"""Checks of what a backend may leave to the core, and what they say of ours, which do."""
CHOSEN = [(backend, check) for backend in BACKENDS for check in choose_checks(backend)]
ROWS = [pytest.param(*row, id=f"{row[0]}-{row[1]}", marks=marks_of(*row)) for row in CHOSEN]


@pytest.mark.parametrize(("backend", "check"), ROWS)
def test_our_own_backends_keep_the_contract(backend, check):
    if check.name in LEFT_OUT:
        with pytest.raises(CheckNotApplicableError, match=LEFT_OUT[check.name]):
            check()
    else:
        check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_check_and_every_width_is_among_them(backend):
    chosen = [check for name, check in CHOSEN if name == backend]
    assert {check.name for check in chosen} == {check.__name__ for check in CHECKS}
    widths = {check.case.nbits for check in chosen if check.name not in AT_ALL_WIDTHS}
    assert widths == set(chosen[0].case.backend.capabilities.nbits)
