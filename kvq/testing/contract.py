"""The contract as a whole: its checks in order, and a run of them over a backend."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kvq.errors import CheckNotApplicableError, ContractViolationError
from kvq.plugin_api.backend_spec import BackendSpec
from kvq.testing.accuracy import check_accuracy, check_bias, check_more_bits
from kvq.testing.case import ContractCase, list_cases
from kvq.testing.declaration import (
    check_configuration,
    check_defaults,
    check_light_import,
    check_options,
    check_requirements,
    check_spec,
)
from kvq.testing.honest_bytes import check_constant_bytes, check_honest_bytes
from kvq.testing.isolation import check_independent, check_threads
from kvq.testing.models import check_fused_attention, check_fused_scores, check_generation
from kvq.testing.operations import check_copies, check_operations, check_save_and_load
from kvq.testing.statistics import check_calibration
from kvq.testing.storage import check_append_only, check_chunk_invariant, check_exact_ends
from kvq.testing.tensors import (
    check_codes,
    check_constants,
    check_decoding,
    check_deterministic,
    check_finite,
    check_input_untouched,
    check_layout,
    check_lost_numbers,
    check_non_contiguous,
)

Check = Callable[[ContractCase], None]
Outcome = Literal["passed", "failed", "not applicable"]

BACKEND_CHECKS: tuple[Check, ...] = (
    check_spec,
    check_light_import,
    check_options,
    check_requirements,
    check_defaults,
    check_calibration,
)
"""Checks of the backend as such: run on its first case."""
DIRECTION_CHECKS: tuple[Check, ...] = (check_more_bits,)
"""Checks of all widths in one direction: run on the first case of each direction."""
CASE_CHECKS: tuple[Check, ...] = (
    check_configuration,
    check_layout,
    check_codes,
    check_input_untouched,
    check_non_contiguous,
    check_deterministic,
    check_finite,
    check_lost_numbers,
    check_decoding,
    check_constants,
    check_accuracy,
    check_bias,
    check_honest_bytes,
    check_constant_bytes,
    check_append_only,
    check_chunk_invariant,
    check_exact_ends,
    check_operations,
    check_copies,
    check_save_and_load,
    check_independent,
    check_threads,
    check_fused_scores,
    check_fused_attention,
    check_generation,
)
"""Checks that run on every case."""
CHECKS: tuple[Check, ...] = (*BACKEND_CHECKS, *DIRECTION_CHECKS, *CASE_CHECKS)
"""Every check of the contract, in the order in which they are run."""


@dataclass(frozen=True)
class CheckResult:
    """The result of one check on one case.

    Attributes:
        check: name of the check.
        case: the case as it is shown, e.g. `4-per_token`.
        outcome: `passed`, `failed` or `not applicable`.
        reason: the fault, or why the check does not apply.
    """

    check: str
    case: str
    outcome: Outcome
    reason: str = ""


@dataclass(frozen=True)
class BoundCheck:
    """A check and the case to run it on; calling it runs the check."""

    check: Check
    case: ContractCase

    def __call__(self) -> None:
        """Run the check.

        Raises:
            ContractViolationError: the backend breaks the contract.
            CheckNotApplicableError: the check does not apply.
        """
        self.check(self.case)

    @property
    def name(self) -> str:
        """The name of the check."""
        return str(getattr(self.check, "__name__", self.check))

    def __str__(self) -> str:
        return f"{self.name}[{self.case}]"


def list_checks(
    backend: BackendSpec | str,
    options: Mapping[str, Any] | None = None,
    *,
    only: Iterable[str] = (),
    nbits: Iterable[float] = (),
    fast: bool = False,
) -> list[BoundCheck]:
    """Return every check with every case that it is run on.

    Args:
        backend: a spec, or the name of an installed or registered backend.
        options: the backend's options, as under `backend_options`.
        only: names of checks; empty: all.
        nbits: bits per code to try; empty: all of the backend's.
        fast: of these, only the fewest and the most in each direction.

    Raises:
        BackendError: the backend is unavailable.
        LookupError: `only` names a check that does not exist, or `nbits` has bits that the backend lacks.
    """
    wanted = set(only)
    unknown = wanted - {check.__name__ for check in CHECKS}
    if unknown:
        known = ", ".join(check.__name__ for check in CHECKS)
        shown = ", ".join(map(repr, sorted(unknown)))
        raise CheckNotApplicableError(f"there is no check {shown}; there are {known}")
    cases = _choose_cases(list_cases(backend, options), set(nbits), fast=fast)
    firsts = list({case.granularity: case for case in reversed(cases)}.values())
    chosen = [(BACKEND_CHECKS, cases[:1]), (DIRECTION_CHECKS, firsts[::-1]), (CASE_CHECKS, cases)]
    bound = [BoundCheck(check, case) for checks, some in chosen for check in checks for case in some]
    return [one for one in bound if not wanted or one.name in wanted]


def _choose_cases(cases: list[ContractCase], nbits: set[float], *, fast: bool) -> list[ContractCase]:
    offered = {case.nbits for case in cases}
    if absent := nbits - offered:
        shown, choices = (", ".join(f"{bits:g}" for bits in sorted(some)) for some in (absent, offered))
        raise CheckNotApplicableError(f"{cases[0].backend.name} has no codes of {shown} bits; choose among {choices}")
    chosen = [case for case in cases if not nbits or case.nbits in nbits]
    if not fast:
        return chosen
    widths = {case.nbits for case in chosen}
    return [case for case in chosen if case.nbits in (min(widths), max(widths))]


def run_checks(checks: Iterable[BoundCheck]) -> Iterator[CheckResult]:
    """Run checks in turn; an error of any kind becomes a result, and the other checks still run."""
    for one in checks:
        outcome, reason = _run(one)
        yield CheckResult(one.name, str(one.case), outcome, reason)


def _run(check: BoundCheck) -> tuple[Outcome, str]:
    try:
        check()
    except CheckNotApplicableError as error:
        return "not applicable", str(error)
    except ContractViolationError as error:
        return "failed", str(error)
    except Exception as error:  # noqa: BLE001  # foreign code may raise anything; it is the result of the check
        return "failed", f"{type(error).__name__}: {error}"
    return "passed", ""
