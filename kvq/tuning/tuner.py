"""Tuning a cache to a model: measure what each setting costs alone, allocate, exchange, and verify on another text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from kvq.attention.hint import without_hint
from kvq.config import KVQCacheConfig
from kvq.errors import EvaluationError
from kvq.evaluation.quality.candidates import make_candidate
from kvq.evaluation.quality.plan import EvaluationPlan
from kvq.evaluation.quality.processes import Processes
from kvq.evaluation.quality.record import QualityRecord
from kvq.evaluation.quality.run import evaluate
from kvq.layers.biased_keys import explain_biased_keys, find_biased_keys
from kvq.planning import plan as plan_memory
from kvq.plugin_api.granularity import Granularity
from kvq.tuning.allocation import Allocator, Choice, Option, Solve, allocate
from kvq.tuning.answer import Point, TunedCache, name_uniform
from kvq.tuning.calibration import AT_ONCE, CalibrationText, check_quantized
from kvq.tuning.costs import Costs
from kvq.tuning.exchange import Refined, refine
from kvq.tuning.goal import Goal
from kvq.tuning.kept_probes import KeptProbes
from kvq.tuning.layer_bytes import LayerBytes
from kvq.tuning.sensitivity import Probe, list_first_probes, measure_probes
from kvq.tuning.side_setting import build_config
from kvq.tuning.sizes import Sizes
from kvq.tuning.tuning_plan import TuningPlan
from kvq.tuning.weight_norms import measure_weight_norms
from kvq.watcher import Nobody, Watcher

FRONT_POINTS = 14
"""Configurations along the front, about: as many as two batches measure."""
UNIFORM_TRIES = 4
"""Uniform configurations that are measured to find the best ones, those first that are predicted to be."""
UNIFORMS = 2
"""Uniform configurations that the answer is compared with on the held-out text."""
KL_ROUNDS = 4
"""Attempts to reach a divergence, each with a smaller prediction than the last one."""
FEW_TOKENS = 500
"""Predicted tokens of the calibration text below which a warning is due."""


NEARLY_BEST = 1.02
"""A choice of measured settings is good enough where settings that are not measured could not better it by more."""


def tune(
    plan: TuningPlan,
    *,
    parts: Path | None = None,
    watcher: Watcher | None = None,
    processes: Processes | None = None,
) -> TunedCache:
    """Fit a cache to a model and a goal.

    Args:
        plan: what to tune, and how.
        parts: folder for what is finished, or None; needed to resume after an interruption.
        watcher: is told how far it is.
        processes: the processes that share the measurements; this one alone unless given. All return the same answer.

    Raises:
        EvaluationError: the goal cannot be reached, or the text is too short for anything to be quantized.
        ConfigError, BackendError: a backend does not take a candidate.
        ModelError: the cache cannot serve this model.
    """
    with without_hint():  # full precision and every cache are read by the same attention
        return Tuner(plan, parts, watcher or Nobody(), processes or Processes()).tune()


def count_bytes(plan: TuningPlan) -> Sizes:
    """Return the bytes of all candidates; nothing is measured yet.

    Raises:
        EvaluationError: the goal is below the smallest candidate.
        ConfigError, BackendError: a backend does not take a candidate.
        ModelError: the cache cannot serve this model.
    """
    counted = LayerBytes(
        plan.model.config, plan.base, context=plan.goal.context, dtype=plan.model.dtype, moment=plan.goal.moment
    )
    sizes = Sizes(plan.space, counted)
    plan.goal.check_reachable(sizes.least_bytes, counted)
    return sizes


class Tuner:
    """The steps of tuning.

    Args:
        plan: what to tune.
        parts: see `tune`.
        watcher: see `tune`.
        processes: see `tune`.
    """

    def __init__(self, plan: TuningPlan, parts: Path | None, watcher: Watcher, processes: Processes) -> None:
        self._plan = plan
        self._parts = parts
        self._watcher = watcher
        self._processes = processes
        self._costs = Costs()
        self._sizes = count_bytes(plan)
        kept = KeptProbes(parts, plan.conditions if parts else {})
        self._text = CalibrationText(plan, kept, watcher, processes)

    def tune(self) -> TunedCache:
        """Measure, allocate, exchange, verify."""
        plan = self._plan
        self._measure(list_first_probes(plan.space))
        check_quantized([one.kl for one in self._costs.sensitivities], plan)
        chosen = self._choose()
        groups = self._sizes.options(self._costs.estimate)
        refined = self._refine(chosen, groups)
        tuned = self._point(refined.choice, refined.after)
        allowed = plan.goal.most_bytes(self._sizes.layer_bytes) or tuned.num_bytes
        uniforms = self._find_uniforms(groups, allowed)
        front = self._measure_front(groups)
        held_out, records = self._verify(tuned, uniforms)
        return TunedCache(
            plan=plan,
            tuned=tuned,
            uniforms=uniforms,
            before=refined.before,
            tries=refined.tried,
            exchanges=refined.taken,
            sensitivities=self._costs.sensitivities,
            front=front,
            memory=plan_memory(plan.model.config, tuned.config, context=plan.goal.context, dtype=plan.model.dtype),
            held_out=held_out,
            records=records,
            weight_norms=measure_weight_norms(plan.model),
            skips=self._text.skips,
            warnings=tuple(_list_warnings(plan, tuned, records)),
        )

    def _measure(self, probes: Sequence[Probe]) -> None:
        self._watcher.begin("single effects", len(probes), "settings")
        self._costs.add(measure_probes(probes, self._text))

    def _choose(self) -> Choice:
        """Return the choice that the sum of single effects makes."""
        most = self._most_choice_bytes()
        if most is not None:
            return _found(self._settle(lambda one: one.within(most)))
        return self._reach(self._plan.goal.max_kl or 0.0)

    def _settle(self, solve: Solve) -> Choice | None:
        """Return the best choice of measured settings; what could be better is measured first.

        Each round finds the best choice by measured costs, and bounds of the others. If a choice of measured ones
        comes close to it there is no better one; else those are measured that it takes and nobody has measured.
        """
        limit = self._plan.space.most_pairs
        while True:
            best = allocate(self._sizes.options(self._costs.bound), solve, limit)
            if best is None:
                return None
            unknown = self._costs.list_unknown(self._sizes.list_probes(best))
            known = self._sizes.options(self._costs.known)
            measured = allocate(known, solve, limit) if unknown and all(known) else None
            if not unknown:
                return best
            if measured is not None and _is_as_good(measured, best, self._plan.goal):
                return measured
            self._measure(unknown)

    def _reach(self, max_kl: float) -> Choice:
        """Return the smallest choice found whose divergence, measured as a whole, is within a bound."""
        target = max_kl
        for _ in range(KL_ROUNDS):
            reach: Callable[[Allocator], Choice | None] = partial(Allocator.reaching, cost=target)
            choice = self._settle(reach)
            if choice is None:
                break
            measured = self._measure_choices([choice], "reaching the divergence")[0]
            if measured <= max_kl:
                return choice
            target *= 0.95 * max_kl / measured
        raise EvaluationError(
            f"--max-kl {max_kl:g} is not reached by any of the candidates; allow more, or give larger --bits"
        )

    def _refine(self, choice: Choice, groups: Sequence[Sequence[Option]]) -> Refined:
        most = self._most_choice_bytes()
        tries = self._plan.tries
        self._watcher.begin("exchanges between layers", tries + 1, "configurations")
        limit = self._plan.space.most_pairs
        return refine(
            choice,
            groups,
            choice.num_bytes if most is None else most,
            lambda choices: self._text.measure(
                [self._sizes.assign(one) for one in choices], "exchanges between layers"
            ),
            tries=tries,
            at_once=AT_ONCE,
            is_allowed=lambda one: limit is None or len({option.name for option in one.options}) <= limit,
        )

    def _find_uniforms(self, groups: Sequence[Sequence[Option]], most_bytes: int) -> list[Point]:
        """Return the best configurations with equal settings in all layers, as measured among the most promising."""
        choices = [_uniform(groups, pair) for pair in self._plan.space.pairs]
        fitting = [one for one in choices if self._sizes.total(one) <= most_bytes]
        promising = sorted(fitting, key=lambda one: one.cost)[:UNIFORM_TRIES]
        self._watcher.begin("uniform configurations", len(promising), "configurations")
        measured = self._measure_choices(promising, "uniform configurations")
        best = sorted(range(len(promising)), key=measured.__getitem__)[:UNIFORMS]
        return [self._point(promising[place], measured[place]) for place in best]

    def _measure_front(self, groups: Sequence[Sequence[Option]]) -> list[Point]:
        choices = Allocator(groups).front(FRONT_POINTS)
        self._watcher.begin("the front", len(choices), "configurations")
        measured = self._measure_choices(choices, "the front")
        return [self._point(*pair) for pair in zip(choices, measured, strict=True)]

    def _measure_choices(self, choices: Sequence[Choice], label: str) -> list[float]:
        found = self._text.measure([self._sizes.assign(one) for one in choices], label)
        return [float(one.double().mean()) for one in found]

    def _point(self, choice: Choice, measured: float) -> Point:
        assignment = self._sizes.assign(choice)
        total = self._sizes.total(choice)
        counted = self._sizes.layer_bytes
        resolved = {index: counted.resolve(index, pair) for index, pair in assignment.items()}
        config = build_config(self._plan.base, resolved, counted.count)
        return Point(config, assignment, total, counted.bits(total), choice.cost, measured)

    def _most_choice_bytes(self) -> int | None:
        """Return the bytes that the groups of layers may have; None where the divergence is the goal."""
        most = self._plan.goal.most_bytes(self._sizes.layer_bytes)
        return None if most is None else most - self._sizes.fixed_bytes

    def _verify(self, tuned: Point, uniforms: Sequence[Point]) -> tuple[EvaluationPlan, list[QualityRecord]]:
        """Measure the answer on the held-out text, as `kvq eval` would."""
        named = {"tuned": tuned, **{f"uniform {name_uniform(one)}": one for one in uniforms}}
        candidates = [make_candidate(label, point.config) for label, point in named.items()]
        plan = self._plan.evaluation(self._plan.held_out, candidates)
        self._watcher.begin("the held-out text", plan.units, "forwards")
        return plan, evaluate(plan, parts=self._parts, processes=self._processes, on_progress=self._watcher.advance)


def _is_as_good(measured: Choice, best: Choice, goal: Goal) -> bool:
    """Return whether a choice comes close to the best that there could be, in what the goal leaves open."""
    if goal.max_kl is not None:
        return measured.num_bytes <= NEARLY_BEST * best.num_bytes
    return measured.cost <= NEARLY_BEST * best.cost


def _uniform(groups: Sequence[Sequence[Option]], pair: object) -> Choice:
    return Choice(tuple(next(one for one in options if one.name == pair) for options in groups))


def _found(choice: Choice | None) -> Choice:
    if choice is None:
        raise EvaluationError("no configuration keeps to all constraints; allow more different settings, or more bytes")
    return choice


def _list_warnings(plan: TuningPlan, tuned: Point, records: Sequence[QualityRecord]) -> list[str]:
    found = []
    tokens = len(plan.text.sequences) * int(plan.text.scored[plan.prefill :].sum())
    if tokens < FEW_TOKENS:
        found.append(
            f"only {tokens} tokens of the calibration text were scored; settings that were chosen on so few may be "
            "chance: raise --sequences or --length"
        )
    held_out = records[0].kl.mean
    if held_out > 2 * tuned.measured:
        found.append(
            f"on the held-out text the divergence is {held_out / tuned.measured:.1f} times that on the calibration "
            "text: calibrate on text like that which the model will read"
        )
    found += _list_biased_keys(plan, tuned.config)
    if plan.base.sink_length == 0:
        found.append("no first tokens are kept exact (sink_length: 0), and many models attend to them most")
    return found


def _list_biased_keys(plan: TuningPlan, config: KVQCacheConfig) -> list[str]:
    """Return a warning where the middles of keys with a large bias are bytes: only the weights tell how large it is."""
    settings = {index: config.for_layer(index) for index in plan.space.layers}
    if any(one.key.granularity is Granularity.PER_TOKEN for one in settings.values()):
        return []  # of these the plan of the cache warns
    told = explain_biased_keys(find_biased_keys(plan.model), settings)
    return [] if told is None else [told]
