"""The contract kit: every rule for backends, as a function that raises if a backend breaks it.

Run from the command line, `kvq check NAME`, or under pytest:

    from kvq.testing import parametrize_contract

    @parametrize_contract("mine")
    def test_contract(contract):
        contract()
"""

from __future__ import annotations

from kvq.testing.case import ContractCase, list_cases
from kvq.testing.contract import CHECKS, BoundCheck, CheckResult, list_checks, run_checks
from kvq.testing.parametrization import parametrize_contract

__all__ = [
    "CHECKS",
    "BoundCheck",
    "CheckResult",
    "ContractCase",
    "list_cases",
    "list_checks",
    "parametrize_contract",
    "run_checks",
]
