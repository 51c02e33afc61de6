"""A tuned configuration as a commented YAML file: what was measured on which text, and what to expect."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from textwrap import wrap

from kvq.evaluation.quality.record import QualityRecord
from kvq.evaluation.quality.text import TokenText
from kvq.registry.requirements import find_versions
from kvq.tuning.answer import Point, TunedCache, name_uniform
from kvq.units import format_bytes

WIDTH = 118
"""Characters of a line of the comment."""
VERSION = find_versions()["kvq"]


def describe_tuned(answer: TunedCache, model_name: str, command: str) -> str:
    """Return the configuration as YAML, under a comment.

    Args:
        answer: the answer.
        model_name: name of the model.
        command: the command that made it.
    """
    lines = [*_list_facts(answer, model_name, command), *_list_layers(answer)]
    return _comment(lines) + answer.config.to_yaml()


def describe_point(point: Point, answer: TunedCache, model_name: str, command: str) -> str:
    """Return a configuration along the front as YAML, under a comment."""
    lines = [
        f"A configuration along the front of `{command}` for {model_name}, kvq {VERSION}.",
        f"{_size(point, answer)}. KL divergence on the calibration text, {describe_text(answer.plan.text)}: "
        f"{point.measured:.2e} measured, {point.predicted:.2e} predicted.",
    ]
    return _comment(lines) + point.config.to_yaml()


def describe_text(text: TokenText) -> str:
    """Return name and size of a text."""
    count, length = text.sequences.shape
    return f"{text.name} ({count} x {length:,} tokens)"


def describe_gain(answer: TunedCache) -> str | None:
    """Return how the answer compares with the best uniform configuration on the held-out text; None without one."""
    if answer.uniform is None:
        return None
    point, uniform = answer.uniform
    ratio = answer.records[0].kl.mean / uniform.kl.mean if uniform.kl.mean else math.nan
    return (
        f"the best uniform configuration within the budget, {name_uniform(point)} ({_size(point, answer)}), has "
        f"{uniform.kl} there: the tuned one has {ratio:.2f} times that"
    )


def _list_facts(answer: TunedCache, model_name: str, command: str) -> Iterator[str]:
    plan, tuned = answer.plan, answer.tuned
    held_out: QualityRecord = answer.records[0]
    dtype = str(plan.model.dtype).removeprefix("torch.")
    yield f"Tuned for {model_name} in {dtype} by kvq {VERSION}: `{command}`"
    yield f"Goal: {plan.goal}. Reached: {_size(tuned, answer)}."
    yield (
        f"Chosen on {describe_text(plan.text)}: KL divergence {tuned.predicted:.2e} predicted by the sum of single "
        f"effects, {tuned.measured:.2e} measured; {plan.prefill} tokens read at once, then steps of {plan.step}."
    )
    yield f"Verified on {describe_text(plan.held_out)}: KL divergence {held_out.kl}."
    gain = describe_gain(answer)
    if gain:
        yield f"{gain[0].upper()}{gain[1:]}."
    yield from (f"Warning: {warning}." for warning in answer.warnings)


def _list_layers(answer: TunedCache) -> Iterator[str]:
    """Yield a line for each group of layers: what its sides cost alone."""
    yield "Layer: keys (KL of these alone) / values (KL of these alone)"
    for layers in answer.plan.space.groups:
        pair = answer.tuned.assignment[layers[0]]
        name = str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
        keys, values = answer.single_effect(layers, "key", pair.key), answer.single_effect(layers, "value", pair.value)
        yield f"{name}: {pair.key} ({keys:.1e}) / {pair.value} ({values:.1e})"


def _size(point: Point, answer: TunedCache) -> str:
    return f"{format_bytes(point.num_bytes)} at {answer.plan.goal.context:,} tokens, {point.bits:.2f} bits an element"


def _comment(lines: Sequence[str]) -> str:
    wrapped = (part for line in lines for part in wrap(line, WIDTH, subsequent_indent="  "))
    return "".join(f"# {part}\n" for part in wrapped)
