"""The contract under pytest: one test for every check and case, in a line of the author's own test file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvq.errors import CheckNotApplicableError
from kvq.plugin_api.backend_spec import BackendSpec
from kvq.testing.contract import BoundCheck, list_checks

if TYPE_CHECKING:
    import pytest


@dataclass(frozen=True)
class SkippingCheck:
    """A check that skips its test if it does not apply."""

    bound: BoundCheck

    def __call__(self) -> None:
        """Run the check; skip the test if it does not apply."""
        import pytest

        try:
            self.bound()
        except CheckNotApplicableError as error:
            pytest.skip(str(error))


def parametrize_contract(
    backend: BackendSpec | str,
    *,
    options: Mapping[str, Any] | None = None,
    fast: bool = False,
    expected_failures: Mapping[str, str] | None = None,
) -> pytest.MarkDecorator:
    """Return a decorator that makes a test of one argument, `contract`, into one for every check and case.

    Args:
        backend: a spec, or the name of an installed or registered backend.
        options: the backend's options, as under `backend_options`.
        fast: try only the fewest and the most bits, in each direction.
        expected_failures: reasons by name, of a check (`check_bias`) or of one case of it (`check_bias[4-per_token]`).
            They are strict: one that passes fails the test.

    Raises:
        BackendError: the backend is unavailable.
        CheckNotApplicableError: an expected failure names no check of this backend.

    Example:
        >>> @parametrize_contract("mine")  # doctest: +SKIP
        ... def test_contract(contract):
        ...     contract()
    """
    import pytest

    reasons = dict(expected_failures or {})
    checks = list_checks(backend, options, fast=fast)
    unknown = reasons.keys() - {name for one in checks for name in (one.name, str(one))}
    if unknown:
        raise CheckNotApplicableError(f"expected failures name no check or case: {', '.join(sorted(unknown))}")
    parameters = []
    for one in checks:
        reason = reasons.get(str(one), reasons.get(one.name))
        marks = [] if reason is None else [pytest.mark.xfail(reason=reason, strict=True)]
        parameters.append(pytest.param(SkippingCheck(one), id=str(one), marks=marks))
    return pytest.mark.parametrize("contract", parameters)
