"""`kvq demo`: the embedded model answers questions from quantized caches, or a language model reads a text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kvq.cli.console import GrowingTable, print_error, print_line
from kvq.cli.model_demo import show_model_demo
from kvq.cli.progress import Progress, show_progress
from kvq.errors import BackendError

if TYPE_CHECKING:
    from kvq.evaluation.demo import DemoCase, DemoRow
    from kvq.evaluation.recall import RecallBatch
    from kvq.plugin_api.backend_spec import BackendSpec

MAX_RECORDS = 166
MAX_SEED = 2**63 - 1
EMBEDDED = "embedded"
OF_QUESTIONS = ("contexts", "questions", "records", "seed")
"""Options without a meaning for a language model."""
COLUMNS = ("backend", "bits", "exact answers", "same tokens", "bits held (K / V)", "cache", "smaller")


def demo(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Option(
            metavar="PATH_OR_ID",
            help="A language model instead of the embedded one: a causal model of transformers, a GGUF file, or "
            "'smollm2': a real model, fetched once.",
        ),
    ] = EMBEDDED,
    backend: Annotated[
        list[str] | None, typer.Option("--backend", "-b", metavar="NAME", help="Only this backend; repeatable.")
    ] = None,
    contexts: Annotated[
        int, typer.Option(metavar="INTEGER", min=1, max=256, help="Contexts to ask about, in one batch.")
    ] = 8,
    questions: Annotated[
        int, typer.Option(metavar="INTEGER", min=1, max=64, help="Questions asked about each context.")
    ] = 32,
    records: Annotated[
        int, typer.Option(metavar="INTEGER", min=16, max=MAX_RECORDS, help="Records in a context, six tokens each.")
    ] = 160,
    seed: Annotated[
        int, typer.Option(metavar="INTEGER", min=0, max=MAX_SEED, help="Seed of the contexts and questions.")
    ] = 1,
) -> None:
    """Answer questions from quantized caches, offline (minutes).

    The embedded model, a small Llama that was trained for this task and shipped with kvq, reads a list of records and
    is asked for some of them. The table shows the share of answers that are right to the last token, the share of
    tokens that equal those in full precision, and the memory that each cache holds. Each row is printed as soon as it
    is measured.

    A language model (--model) reads a text instead. The table shows how far its predictions are from those in full
    precision, and the text as each cache continues it stands below.
    """
    if model != EMBEDDED:
        _refuse_options(context)
        with show_progress("loading the model") as progress:
            show_model_demo(model, _find_backends(backend), progress)
        return
    if questions > records:
        print_error(f"--questions {questions} is more than --records {records}; ask fewer questions")
        raise typer.Exit(2)
    with show_progress("loading the model") as progress:
        from kvq.evaluation.demo import list_cases

        cases = list_cases(_find_backends(backend))
        batch = _draw(contexts, records, questions, seed)
        rows = _run(cases, batch, progress)
    _print_comparisons(rows, contexts)
    _print_sample(rows, batch)


def _refuse_options(context: typer.Context) -> None:
    """End the command if it is given options that only the questions to the embedded model have."""
    given = [name for name in OF_QUESTIONS if str(context.get_parameter_source(name)).endswith("COMMANDLINE")]
    if given:
        print_error(f"--{given[0]} is about the questions to the embedded model; leave it out, or leave out --model")
        raise typer.Exit(2)


def _run(cases: list[DemoCase], batch: RecallBatch, progress: Progress) -> list[DemoRow]:
    """Measure the cases, and print each as soon as it is done."""
    from kvq.evaluation.demo import run_cases
    from kvq.evaluation.embedded_model import load_embedded_model

    model, _ = load_embedded_model()
    names = [_name(case) for case in cases]
    progress.begin(names[0], len(cases), "caches")
    table = _begin_table(cases, batch)
    rows = []
    for row, upcoming in zip(run_cases(model, batch, cases), [*names[1:], "done"], strict=True):
        rows.append(row)
        table.add(_cells(row))
        progress.advance(upcoming)
    return rows


def _name(case: DemoCase) -> str:
    return f"{case.backend} {case.bits}" if case.config else case.backend


def _find_backends(names: list[str] | None) -> list[BackendSpec]:
    """Return the named backends, or all usable ones; an unusable one that is named ends the command."""
    from kvq.registry import get_registry

    registry = get_registry()
    if names is None:
        return [info.spec for info in registry.available_backends(load=True) if info.state == "ready" and info.spec]
    try:
        specs = [registry.get_backend(name) for name in dict.fromkeys(names)]
        for spec in specs:
            registry.check_requirements(spec)
    except BackendError as error:
        print_error(str(error))
        raise typer.Exit(2) from error
    return specs


def _draw(contexts: int, records: int, questions: int, seed: int) -> RecallBatch:
    import torch

    from kvq.evaluation.recall import sample_recall_batch

    return sample_recall_batch(contexts, records, questions, generator=torch.Generator().manual_seed(seed))


def _begin_table(cases: list[DemoCase], batch: RecallBatch) -> GrowingTable:
    contexts, tokens = batch.context.shape
    asked = contexts * batch.questions.shape[1]
    print_line(f"{asked} questions about {contexts} contexts of {tokens} tokens; one question is {1 / asked:.1%}")
    print_line("same tokens: as in full precision; bits held: metadata and room for tokens to come included")
    widths = [max(len(case.backend) for case in cases), max(len(case.bits) for case in cases), 6, 6, 13, 12, 6]
    return GrowingTable(COLUMNS, widths)


def _cells(row: DemoRow) -> tuple[str, ...]:
    score, memory = row.score, row.score.memory
    facts = row.case.backend, row.case.bits, f"{score.exact_rate:.1%}", f"{score.agreement:.1%}"
    held = f"{score.held_bytes / 2**20:.2f} MiB"
    if memory is None:
        return *facts, "16 / 16", held, "1.00x"
    bits = " / ".join(
        "-" if side is None else f"{side:.2f}" for side in (memory.effective_bits_key, memory.effective_bits_value)
    )
    return *facts, bits, held, f"{memory.compression:.2f}x"


def _print_comparisons(rows: list[DemoRow], contexts: int) -> None:
    """Print how many answers few bits cost, and on which side they cost less, with the intervals."""
    from kvq.evaluation.demo import FULL_PRECISION_BITS, compare_bits

    asked = (
        ("K4V4 against full precision", "K4V4", FULL_PRECISION_BITS),
        ("K4V2 against full precision", "K4V2", FULL_PRECISION_BITS),
        ("K4V2 against K2V4, which holds as many bytes", "K4V2", "K2V4"),
    )
    found = [(head, compare_bits(rows, bits, others)) for head, bits, others in asked]
    if not any(comparisons for _, comparisons in found):
        return
    interval = f", 95 % interval over {contexts} contexts" if contexts > 1 else ""
    print_line()
    print_line(f"Difference in exact answers, in points{interval}:")
    for head, comparisons in found:
        if comparisons:
            print_line(f"  {head}: {', '.join(f'{one.backend} {one}' for one in comparisons)}")


def _print_sample(rows: list[DemoRow], batch: RecallBatch) -> None:
    """Print a question on which the rows differ, if there is one, with every answer."""
    from kvq.evaluation.recall import ANSWER_LENGTH, decode_tokens

    def answers(row: int, question: int) -> list[str]:
        return [decode_tokens(r.score.predictions[row, question, :ANSWER_LENGTH].tolist()) for r in rows]

    places = [(i, j) for i in range(batch.questions.shape[0]) for j in range(batch.questions.shape[1])]
    row, question = max(places, key=lambda place: len(set(answers(*place))))
    right = batch.answers[row, question].tolist()
    context = batch.context[row].tolist()
    print_line()
    print_line(f"One context: {decode_tokens(context[1:25])} ... {decode_tokens(context[-12:])}")
    print_line(f"Asked: {decode_tokens(batch.questions[row, question, :2].tolist())}")
    print_line(f"{'in the context':>22}: {decode_tokens(right)}")
    for one, said in zip(rows, answers(row, question), strict=True):
        print_line(f"{_name(one.case):>22}: {said}")
