"""What a file says of the model that its numbers belong to, in words that can be read again."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class WeightsSample(BaseModel):
    """A digest of fixed elements of a key projection."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str
    digest: str


class ModelFingerprint(BaseModel):
    """Facts of a model's configuration and samples of its weights, by which it is recognized."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    facts: dict[str, Any]
    weights: list[WeightsSample]


def explain_difference(there: ModelFingerprint, here: ModelFingerprint) -> str | None:
    """Return in what two models differ, or None where they may be the same.

    Weights are compared where both sides have them: a configuration alone has none.

    Args:
        there: the model of the file.
        here: the model that the file is used with.
    """
    differing = [
        f"{name} is {there.facts.get(name)!r} there and {here.facts.get(name)!r} here"
        for name in sorted({*there.facts, *here.facts})
        if there.facts.get(name) != here.facts.get(name)
    ]
    if differing:
        return "; ".join(differing)
    saved, own = ({sample.name: sample.digest for sample in one.weights} for one in (there, here))
    common = saved.keys() & own.keys()
    names = sorted(name for name in common or saved if saved[name] != own.get(name) and own)
    return f"the weights of {', '.join(names)} differ" if names else None
