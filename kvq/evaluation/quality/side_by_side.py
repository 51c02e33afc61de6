"""One batch read by full precision and by several caches side by side, forward by forward.

Of full precision's predictions only those of the current forward are kept, once for all caches. Its logits over a whole
text would take more memory than the caches do: of a vocabulary of 49,152 they are 192 KiB a token in float32, while the
states of the model that has it (SmolLM2-135M) are 45 KiB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
from transformers.cache_utils import Cache

from kvq.cache.kvq import KVQ
from kvq.evaluation.quality.candidates import (
    Candidate,
    count_full_precision_bytes,
    count_held_bytes,
    history_errors,
)
from kvq.evaluation.quality.forcing import read_steps
from kvq.evaluation.quality.free_running import Divergence, cut_at_end, find_ends, write_on
from kvq.evaluation.quality.metrics import Expected, TokenScores
from kvq.evaluation.quality.needle import NeedleScore, ask_all
from kvq.evaluation.quality.plan import EvaluationPlan
from kvq.evaluation.quality.prefix import Prefix
from kvq.evaluation.quality.record import BatchResult, NeedleAnswer

T = TypeVar("T")
DISTANCE_BINS = 8
PLAIN = "full precision"
OnProgress = Callable[[str, int], None]
"""Called with the name of what goes on and the forwards that are done since the last call."""


class SideBySide:
    """Full precision and some caches on one batch.

    Args:
        plan: the run.
        index: index of the batch.
        candidates: the caches.
        failures: reason by label of each cache that cannot be measured, where it may fail; it grows.
        on_progress: see `OnProgress`.
    """

    def __init__(
        self,
        plan: EvaluationPlan,
        index: int,
        candidates: Sequence[Candidate],
        failures: dict[str, str],
        on_progress: OnProgress,
    ) -> None:
        self._plan = plan
        self._index = index
        self._candidates = candidates
        self._failures = failures
        self._on_progress = on_progress
        self._forgiven = {candidate.label for candidate in candidates if candidate.is_peer or candidate.may_fail}
        rows = plan.sequence_rows(index)
        self._tokens = plan.text.sequences[rows].to(plan.model.device)
        last = rows.start + len(self._tokens)
        self._name = f"texts {rows.start + 1} to {last} of {len(plan.text.sequences)}"

    def measure(self) -> Iterator[tuple[Candidate, BatchResult]]:
        """Yield the result of each cache that could be measured."""
        results, needles, divergences = self._read(), self._ask(), self._write()
        for candidate in self._candidates:
            label = candidate.label
            if label not in self._failures:
                found = results[label]
                yield candidate, replace(found, needles=needles.get(label, []), divergences=divergences.get(label, []))

    def _read(self) -> dict[str, BatchResult]:
        """Read the text; a result has all but what the other tasks say."""
        plan, done = self._plan, 1
        following = self._tokens[:, plan.prefill :]
        prefix, caches = self._share(self._tokens[:, : plan.prefill], "reading")
        expected = Expected.of_logits(prefix.logits, following[:, :1])
        scores = {label: [TokenScores.compare(prefix.logits, expected)] for label in caches}
        reading = {
            label: read_steps(plan.model, following[:, :-1], cache, plan.step) for label, cache in caches.items()
        }
        for label, logits in self._in_step(reading, "reading"):
            if label == PLAIN:
                expected = Expected.of_logits(logits, following[:, done : done + logits.shape[1]])
                done += logits.shape[1]
            else:
                scores[label].append(TokenScores.compare(logits, expected))
        plain = caches.pop(PLAIN)
        return {label: self._measure(cache, plain, scores[label]) for label, cache in self._complete(caches)}

    def _measure(self, cache: Cache, reference: Cache, scores: Sequence[TokenScores]) -> BatchResult:
        memory = cache.memory() if isinstance(cache, KVQ) else None
        return BatchResult(
            scores=TokenScores.concatenate(scores, dim=1).select(self._plan.text.scored[self._plan.prefill :]),
            held_bytes=count_held_bytes(cache),
            full_precision_bytes=count_full_precision_bytes(cache, reference),
            errors_by_distance=history_errors(cache, reference, DISTANCE_BINS),
            bits=(memory.effective_bits_key, memory.effective_bits_value) if memory else (None, None),
        )

    def _ask(self) -> dict[str, list[NeedleAnswer]]:
        """Ask this batch's share of the questions."""
        answers: dict[str, list[NeedleAnswer]] = {}
        for rows in self._plan.needle_batches(self._index):
            for label, scores in self._ask_rows(rows).items():
                answers.setdefault(label, []).extend(scores)
        return answers

    def _ask_rows(self, rows: slice) -> dict[str, list[NeedleAnswer]]:
        model, task = self._plan.model, self._plan.needles
        if task is None:
            return {}
        _, caches = self._share(task.contexts[rows].to(model.device), "asking")
        said: dict[str, list[NeedleScore]] = {label: [] for label in caches}
        asking = {label: ask_all(model, task, rows, cache) for label, cache in caches.items()}
        for label, scores in self._in_step(asking, "asking"):
            said[label] += scores
        plain = said.pop(PLAIN)
        return {label: list(zip(scores, plain, strict=True)) for label, scores in self._complete(said)}

    def _write(self) -> dict[str, list[Divergence]]:
        """Let every cache continue the texts of this batch."""
        plan = self._plan
        if not plan.continuation:
            return {}
        prefix, caches = self._share(self._tokens[:, : plan.prompt_length], "writing")
        said: dict[str, list[torch.Tensor]] = {label: [] for label in caches}
        writing = {
            label: write_on(plan.model, cache, prefix.logits, plan.continuation) for label, cache in caches.items()
        }
        for label, tokens in self._in_step(writing, "writing"):
            said[label].append(tokens)
        plain = self._texts(said.pop(PLAIN))
        return {
            label: [Divergence.between(*pair) for pair in zip(self._texts(tokens), plain, strict=True)]
            for label, tokens in self._complete(said)
        }

    def _texts(self, said: Sequence[torch.Tensor]) -> list[list[int]]:
        """Return the continuations `[B]` that were said in steps `[B, 1]`, each up to its end."""
        ends = find_ends(self._plan.model)
        return [cut_at_end(row, ends) for row in torch.cat(list(said), dim=1).tolist()]

    def _complete(self, found: Mapping[str, T]) -> Iterator[tuple[str, T]]:
        """Yield what belongs to the caches that have not failed."""
        yield from ((label, one) for label, one in found.items() if label not in self._failures)

    def _share(self, tokens: torch.Tensor, task: str) -> tuple[Prefix, dict[str, Cache]]:
        """Read tokens once in full precision, and return all caches that hold them, that of full precision first."""
        self._tell(task, 0)
        prefix = Prefix(self._plan.model, tokens)
        caches = {PLAIN: prefix.cache}
        for candidate in self._candidates:
            if candidate.label not in self._failures:
                with self._forgiving(candidate.label):
                    cache = candidate.build(self._plan.model)
                    prefix.give_to(cache)
                    caches[candidate.label] = cache
        prefix.forget()
        return prefix, caches

    def _in_step(self, tasks: Mapping[str, Iterator[T]], task: str) -> Iterator[tuple[str, T]]:
        """Advance all caches by one forward, again and again, and yield what each one says, full precision first."""
        for plain in tasks[PLAIN]:
            self._tell(task, 1)
            yield PLAIN, plain
            for label, forwards in self._complete(tasks):
                if label != PLAIN:
                    with self._forgiving(label):
                        yield label, next(forwards)
                    self._tell(task, 1)

    @contextmanager
    def _forgiving(self, label: str) -> Iterator[None]:
        """Note the failure of a cache that may fail, and leave it out from there on.

        It is one that this version of transformers lacks, or that cannot serve the model.
        """
        try:
            yield
        except Exception as error:
            if label not in self._forgiven:
                raise
            self._failures[label] = f"{type(error).__name__}: {error}".splitlines()[0]

    def _tell(self, task: str, forwards: int) -> None:
        self._on_progress(f"{task} {self._name}", forwards)
