"""The demo on a language model: the caches of `kvq.evaluation.demo`, and what they change in a text that it reads.

Owns which text is read, and how much of it. All measuring is that of `kvq.evaluation.quality`: a language model has no
list of right answers to count, but its next words are known in full precision.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvq.attention.hint import without_hint
from kvq.errors import EvaluationError
from kvq.evaluation.demo import DemoCase
from kvq.evaluation.one_thread import one_thread
from kvq.evaluation.quality.candidates import Candidate, make_candidate
from kvq.evaluation.quality.free_running import Divergence
from kvq.evaluation.quality.plan import AT_ONCE, EvaluationPlan
from kvq.evaluation.quality.record import QualityRecord, summarize
from kvq.evaluation.quality.side_by_side import OnProgress, SideBySide
from kvq.evaluation.quality.text import TokenText, is_recall_tokenizer, load_dataset

TEXT = "topics-report"
LENGTH, PREFILL, STEP, CONTINUATION = 640, 512, 32, 20
"""Tokens of the text; those read at once; those of each later forward, no more than the window; those written."""


@dataclass(frozen=True)
class ModelDemoRow:
    """What one cache changes.

    Attributes:
        record: its quality on the text, and its memory.
        continuation: how its continuation of the text differs from full precision's.
    """

    record: QualityRecord
    continuation: Divergence


def plan_demo(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cases: Sequence[DemoCase]) -> EvaluationPlan:
    """Return what the demo measures on a model; full precision among the cases is what all others are compared with.

    Raises:
        EvaluationError: the model cannot read the text, or takes fewer tokens.
    """
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or LENGTH
    if longest < LENGTH:
        raise EvaluationError(f"the demo reads {LENGTH} tokens, but the model has {longest} positions: try kvq eval")
    text = _read_text(tokenizer)
    candidates = [make_candidate(f"{case.backend} {case.bits}", case.config) for case in cases if case.config]
    for candidate in candidates:
        candidate.build(model)  # what the model cannot have is an error now, not in a minute
    return EvaluationPlan(model, text, candidates, None, prefill=PREFILL, step=STEP, continuation=CONTINUATION)


def _read_text(tokenizer: PreTrainedTokenizerBase) -> TokenText:
    """Return the end of the text: sentences, where its beginning is a list of examples."""
    if is_recall_tokenizer(tokenizer):
        raise EvaluationError("this is the embedded model, which knows no text: leave out --model")
    ends = load_dataset(TEXT, tokenizer, sequences=2, length=LENGTH)
    return replace(ends, sequences=ends.sequences[-1:])


def run_demo(plan: EvaluationPlan, on_progress: OnProgress) -> Iterator[ModelDemoRow]:
    """Measure the caches, and yield as many rows at a time as read side by side."""
    for start in range(0, len(plan.candidates), AT_ONCE):
        yield from _measure(plan, plan.candidates[start : start + AT_ONCE], on_progress)


def _measure(plan: EvaluationPlan, candidates: Sequence[Candidate], on_progress: OnProgress) -> list[ModelDemoRow]:
    bits = 8 * plan.model.dtype.itemsize
    with one_thread(), without_hint():
        return [
            ModelDemoRow(summarize(candidate, [result], plan.positions, bits), result.divergences[0])
            for candidate, result in SideBySide(plan, 0, candidates, {}, on_progress).measure()
        ]
