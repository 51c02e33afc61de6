"""The answer of tuning as tables, sentences and a JSON document."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kvq.evaluation.quality.report import describe_run
from kvq.tuning.answer import TunedCache, name_uniform
from kvq.tuning.side_setting import SideSetting
from kvq.tuning.tuned_file import describe_gain, describe_text
from kvq.units import format_bytes

LAYER_COLUMNS = ("layers", "keys", "values", "KL of keys alone", "KL of values alone", "weight norms K / V")
FRONT_COLUMNS = ("bits an element", "bytes", "KL predicted", "KL measured", "")


def layer_rows(answer: TunedCache) -> list[tuple[str, ...]]:
    """Return a row of cells under `LAYER_COLUMNS` for each group of layers."""
    rows: list[tuple[str, ...]] = []
    for layers in answer.plan.space.groups:
        pair = answer.tuned.assignment[layers[0]]
        rows.append(
            (
                str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}",
                _shorten(pair.key, answer),
                _shorten(pair.value, answer),
                f"{answer.single_effect(layers, 'key', pair.key):.1e}",
                f"{answer.single_effect(layers, 'value', pair.value):.1e}",
                _norms(answer, layers[0]),
            )
        )
    return rows


def front_rows(answer: TunedCache) -> list[tuple[str, ...]]:
    """Return a row of cells under `FRONT_COLUMNS` for each point of the front, the answer and the uniform one."""
    named = [(point, "") for point in answer.front] + [(answer.tuned, "tuned")]
    named += [(point, f"uniform {name_uniform(point)}") for point in answer.uniforms]
    return [
        (f"{one.bits:.2f}", format_bytes(one.num_bytes), f"{one.predicted:.1e}", f"{one.measured:.1e}", name)
        for one, name in sorted(named, key=lambda entry: entry[0].num_bytes)
    ]


def list_lines(answer: TunedCache) -> Iterator[str]:
    """Yield what there is to say beside the tables, a sentence a line."""
    tuned, plan = answer.tuned, answer.plan
    yield (
        f"tuned: {format_bytes(tuned.num_bytes)} at {plan.goal.context:,} tokens, {tuned.bits:.2f} bits an element, "
        f"{answer.memory.full_precision_bytes / answer.memory.total_bytes:.2f}x smaller than full precision"
    )
    yield (
        f"chosen on {describe_text(plan.text)}: KL {tuned.predicted:.2e} predicted by the sum of single effects, "
        f"{tuned.measured:.2e} measured ({answer.before:.2e} before {answer.exchanges} exchanges between layers, of "
        f"{answer.tries} tried)"
    )
    yield f"verified on {describe_text(plan.held_out)}: KL {answer.records[0].kl}"
    gain = describe_gain(answer)
    if gain:
        yield gain
    if answer.weight_norms:
        larger = sum(key > value for key, value in answer.weight_norms.values())
        more = sum(
            (pair.key.nbits if pair.key else 0) > (pair.value.nbits if pair.value else 0)
            for pair in tuned.assignment.values()
        )
        yield (
            f"weights of keys have the larger norm in {larger} of {len(answer.weight_norms)} layers; keys got more "
            f"bits in {more} of {len(tuned.assignment)} (the norms decide nothing)"
        )


def describe_answer(answer: TunedCache, model_name: str, command: str) -> dict[str, Any]:
    """Return all results as plain values: those of `kvq eval` on the held-out text, and `tuning` beside them."""
    plan = answer.plan
    tuning = {
        "command": command,
        "goal": {
            "context": plan.goal.context,
            "bits": plan.goal.bits,
            "memory_bytes": plan.goal.memory_bytes,
            "max_kl": plan.goal.max_kl,
        },
        "calibration": plan.text.name,
        "calibration_sequences": len(plan.text.sequences),
        "calibration_length": plan.text.sequences.shape[1],
        "tuned": answer.tuned.to_dict(),
        "uniforms": [point.to_dict() for point in answer.uniforms],
        "before_exchanges": answer.before,
        "exchanges_tried": answer.tries,
        "exchanges_kept": answer.exchanges,
        "layers_skipped": answer.skips,
        "sensitivities": [one.to_dict() for one in answer.sensitivities],
        "front": [point.to_dict() for point in answer.front],
        "weight_norms": {str(index): list(norms) for index, norms in answer.weight_norms.items()},
        "warnings": list(answer.warnings),
    }
    return {**describe_run(answer.held_out, model_name, answer.records), "tuning": tuning}


def _shorten(setting: SideSetting | None, answer: TunedCache) -> str:
    """Return a setting without what all candidates share."""
    if setting is None:
        return "full precision"
    every = {*answer.plan.space.keys, *answer.plan.space.values}
    words = [f"{setting.nbits:g} bit"]
    for name, text in (
        ("backend", setting.backend),
        ("axis", setting.axis),
        ("group_size", f"by {setting.group_size}"),
        ("rotation", f"rotation {setting.rotation}"),
        ("balance", f"balance {setting.balance}"),
        ("clip", f"clip {setting.clip}"),
        ("metadata", f"metadata {setting.metadata}"),
    ):
        if len({getattr(one, name) for one in every}) > 1:
            words.append(text)
    return ", ".join(words)


def _norms(answer: TunedCache, layer: int) -> str:
    norms = answer.weight_norms.get(layer)
    return "-" if norms is None else f"{norms[0]:.1f} / {norms[1]:.1f}"
