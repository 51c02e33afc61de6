"""The contract, for both formats."""

from kvq.testing import parametrize_contract


@parametrize_contract("fp8")
def test_e4m3(contract):
    contract()


@parametrize_contract("fp8", options={"format": "e5m2"})
def test_e5m2(contract):
    contract()
