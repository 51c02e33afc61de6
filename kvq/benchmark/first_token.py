"""Time from a prompt to its first and second token: in a fresh process, and in one that has done it before.

The first token includes quantizing the prompt and, in a fresh process, importing libraries that are only imported when
needed. The second is the first decode step, where a kernel is compiled or loaded.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from kvq.benchmark.baselines import register_packed_attention
from kvq.benchmark.clock import time_call
from kvq.benchmark.contenders import BUFFER, DYNAMIC, DYNAMIC_PACKED, Contender, ContenderChoice
from kvq.benchmark.models import build_model
from kvq.benchmark.setting import Setting, Shape, find_dtype
from kvq.benchmark.statistics import Spread, ratio
from kvq.errors import KVQError
from kvq.evaluation.model_loading import load_model
from kvq.transformers_seams.private_names import pass_cache

SPARE_TOKENS = 2
"""Tokens after the prompt, for which a buffer needs room."""


@dataclass
class FirstTokens:
    """Times of one contender.

    Attributes:
        label: the contender's label.
        cold_ms: milliseconds to the first token and from there to the second, in a fresh process.
        warm_ms: the same for each warm round.
        failure: the reason if nothing was measured.
    """

    label: str
    cold_ms: tuple[float, float] | None = None
    warm_ms: list[tuple[float, float]] = field(default_factory=list)
    failure: str | None = None

    def to_dict(self, dynamic: Sequence[float]) -> dict[str, Any]:
        """Return plain values; `dynamic` are the milliseconds of `DynamicCache` to the first token, warm."""
        firsts, seconds = ([times[place] for times in self.warm_ms] for place in (0, 1))
        return {
            "label": self.label,
            "cold_ms": {"first": self.cold_ms[0], "second": self.cold_ms[1]} if self.cold_ms else None,
            "warm_ms": {"first": asdict(Spread.of(firsts)), "second": asdict(Spread.of(seconds))} if firsts else None,
            "first_to_dynamic": asdict(ratio(firsts, dynamic)) if firsts and len(firsts) == len(dynamic) else None,
            "failure": self.failure,
        }


def measure_first_tokens(
    setting: Setting,
    choice: ContenderChoice,
    rounds: int,
    model_name: str | None = None,
    limit_s: float = math.inf,
    on_progress: Callable[[str, int], None] = lambda label, work: None,  # noqa: ARG005
) -> dict[str, Any]:
    """Return the times of every contender, as plain values: first each one cold, then all in turns.

    Args:
        setting: the prompt's length, rows, dtype and device, and the shape of the random model.
        choice: the contenders.
        rounds: number of warm runs.
        model_name: the user's model; a random one of the setting's shape unless given.
        limit_s: seconds that the warm runs of one contender may take, estimated from its cold one.
        on_progress: called with a label and the number of tokens read.
    """
    contenders = choose_for_prompts(choice.contenders())
    found = [FirstTokens(one.label) for one in contenders]
    for one in found:
        on_progress(f"{one.label}, first token cold", setting.tokens)
        _measure_cold(one, setting, choice, model_name)
        if one.cold_ms is not None and one.cold_ms[0] * rounds > limit_s * 1e3:
            one.failure = f"no warm run: {rounds} would take more than the {limit_s:.0f} s that are allowed"
    model = _load(model_name, setting)
    for _ in range(rounds):
        for one, contender in zip(found, contenders, strict=True):
            on_progress(f"{one.label}, first token warm", setting.tokens)
            if one.failure is None:
                one.warm_ms.append(read_prompt(model, contender, setting))
    dynamic = [first for one in found if one.label == DYNAMIC for first, _ in one.warm_ms]
    described = [one.to_dict(dynamic) for one in found]
    return {**setting.to_dict(), "shape": asdict(setting.shape), "contenders": described}


def choose_for_prompts(contenders: Sequence[Contender]) -> list[Contender]:
    """Return the contenders that read a prompt differently: of full precision, whose three forms read alike, one."""
    return [one for one in contenders if not one.is_variant and one.label not in (DYNAMIC_PACKED, BUFFER)]


@torch.inference_mode()
def read_prompt(model: PreTrainedModel, contender: Contender, setting: Setting) -> tuple[float, float]:
    """Return the milliseconds to the first token and from there to the second."""
    model.set_attn_implementation(contender.attention)
    generator = torch.Generator("cpu").manual_seed(0)
    prompt = torch.randint(setting.shape.vocabulary, (setting.batch, setting.length), generator=generator)
    prompt = prompt.to(setting.device)
    cache = contender.build(model.config, setting.length + SPARE_TOKENS)

    def advance(tokens: torch.Tensor) -> None:
        logits = model(tokens, use_cache=True, logits_to_keep=1, **pass_cache(model, cache)).logits
        logits.argmax(-1)

    first = time_call(lambda: advance(prompt), setting.device)
    return first, time_call(lambda: advance(prompt[:, :1]), setting.device)


def _load(name: str | None, setting: Setting) -> PreTrainedModel:
    if name is None:
        return build_model(setting.shape, setting.dtype, setting.device)
    dtype = str(setting.dtype).removeprefix("torch.")
    return load_model(name, dtype=dtype, device=str(setting.device))[0]


def _measure_cold(one: FirstTokens, setting: Setting, choice: ContenderChoice, model_name: str | None) -> None:
    asked = {
        "label": one.label,
        "setting": setting.to_dict(),
        "shape": asdict(setting.shape),
        "device": str(setting.device),
        "threads": torch.get_num_threads(),
        "choice": choice.to_dict(),
        "model": model_name,
    }
    command = [sys.executable, "-m", "kvq.benchmark.first_token", json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  # our own module
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        one.failure = lines[-1] if lines else f"the process ended with code {done.returncode}"
        return
    one.cold_ms = tuple(json.loads(done.stdout.splitlines()[-1]))


def main(arguments: Sequence[str]) -> None:
    """Read a prompt once, in this process, and write both times to stdout as JSON.

    Raises:
        KVQError: the contender is not among those that are chosen.
    """
    asked = json.loads(arguments[0])
    torch.set_num_threads(asked["threads"])
    register_packed_attention()
    given = asked["setting"]
    device = torch.device(asked["device"])
    setting = Setting(Shape(**asked["shape"]), given["length"], given["batch"], find_dtype(given["dtype"]), device)
    contenders = ContenderChoice(**asked["choice"]).contenders()
    contender = next((one for one in contenders if one.label == asked["label"]), None)
    if contender is None:
        raise KVQError(f"no contender is called {asked['label']!r}")
    model = _load(asked["model"], setting)
    sys.stdout.write(json.dumps(read_prompt(model, contender, setting)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
