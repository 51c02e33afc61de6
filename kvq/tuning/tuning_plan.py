"""What is tuned, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from kvq.config import KVQCacheConfig
from kvq.evaluation.quality.candidates import Candidate
from kvq.evaluation.quality.plan import EvaluationPlan
from kvq.evaluation.quality.text import TokenText
from kvq.tuning.goal import Goal
from kvq.tuning.search_space import SearchSpace
from kvq.tuning.side_setting import PAIR_FIELDS


@dataclass(frozen=True)
class TuningPlan:
    """What is tuned, and how.

    Attributes:
        model: a causal model.
        text: the text that settings are chosen on.
        held_out: another text, on which the answer is verified.
        space: what may be chosen.
        goal: what the cache is tuned for.
        base: the settings that hold for all layers, such as the window.
        prefill: tokens of each sequence that are read at once and not scored.
        step: tokens of each later forward.
        batch_size: sequences read together.
        tries: most whole configurations to measure for exchanges between layers.
    """

    model: PreTrainedModel
    text: TokenText
    held_out: TokenText
    space: SearchSpace
    goal: Goal
    base: KVQCacheConfig
    prefill: int = 128
    step: int = 32
    batch_size: int = 2
    tries: int = 14

    @property
    def conditions(self) -> dict[str, Any]:
        """All that a measurement on the calibration text depends on but the settings of sides, as plain values."""
        base = {name: value for name, value in self.base.to_dict().items() if name not in ("layers", *PAIR_FIELDS)}
        return {"calibration": self.evaluation(self.text, ()).digest, "base": base}

    def evaluation(self, text: TokenText, candidates: Sequence[Candidate]) -> EvaluationPlan:
        """Return the plan of an evaluation on one of the texts, read as the calibration text is."""
        sizes = {"prefill": self.prefill, "step": self.step, "batch_size": self.batch_size}
        return EvaluationPlan(self.model, text, candidates, None, **sizes)
