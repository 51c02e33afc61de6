"""The contract. The variant for dot products pays for them in squared error, as the paper says it must."""

from kvq.testing import parametrize_contract

COSTS = {"check_accuracy": (2.5, 3, 3.5, 4), "check_bias": (3, 4)}
EXPECTED = {
    f"{check}[{bits:g}-{axis}-inner_product_True]": "unbiased dot products cost squared error (theorem 2)"
    for check, widths in COSTS.items()
    for bits in widths
    for axis in ("per_token", "per_channel")
}


@parametrize_contract("turboquant")
def test_contract(contract):
    contract()


@parametrize_contract("turboquant", options={"inner_product": True}, expected_failures=EXPECTED)
def test_contract_of_the_inner_product_variant(contract):
    contract()
