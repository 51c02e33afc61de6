"""`kvq demo`: the embedded model answers questions from quantized caches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import Progress

from kvq.cli.console import get_console, print_error, print_line, print_table
from kvq.errors import BackendError

if TYPE_CHECKING:
    from kvq.backend_spec import BackendSpec
    from kvq.evaluation.demo import DemoRow
    from kvq.evaluation.recall import RecallBatch
    from kvq.evaluation.scoring import RecallScore

MAX_RECORDS = 166


def demo(
    backend: Annotated[
        list[str] | None, typer.Option("--backend", "-b", help="Only this backend; may be given several times.")
    ] = None,
    contexts: Annotated[int, typer.Option(min=1, max=256, help="Contexts to ask about, in one batch.")] = 16,
    questions: Annotated[int, typer.Option(min=1, max=64, help="Questions about each context.")] = 16,
    records: Annotated[int, typer.Option(min=16, max=MAX_RECORDS, help="Records in a context, six tokens each.")] = 160,
    seed: Annotated[int, typer.Option(help="Seed of the contexts and questions.")] = 1,
) -> None:
    """Answer questions from quantized caches with the embedded model, offline (a minute or two).

    A small Llama, trained for this task and shipped with kvq, reads a list of records and is asked for some of them.
    The table shows the share of answers that are right to the last token, the share of tokens that equal those in full
    precision, and what each cache holds.
    """
    from kvq.evaluation.demo import list_cases, run_cases
    from kvq.evaluation.embedded_model import load_embedded_model

    if questions > records:
        print_error(f"--questions {questions} is more than --records {records}; ask fewer questions")
        raise typer.Exit(2)
    specs = _find_backends(backend)
    model, _ = load_embedded_model()
    batch = _draw(contexts, records, questions, seed)
    cases = list_cases(specs)
    rows = []
    with Progress(console=get_console(stderr=True), transient=True) as progress:
        names = [f"{case.backend} {case.bits}" for case in cases]
        task = progress.add_task(names[0], total=len(cases))
        for row, upcoming in zip(run_cases(model, batch, cases), [*names[1:], "done"], strict=True):
            rows.append(row)
            progress.update(task, advance=1, description=upcoming)
    _print_scores(rows, batch)
    _print_sample(rows, batch)


def _find_backends(names: list[str] | None) -> list[BackendSpec]:
    """Return the named backends, or all usable ones; an unusable one that is named ends the command."""
    from kvq.registry import get_registry

    registry = get_registry()
    if names is None:
        return [info.spec for info in registry.available_backends(load=True) if info.state == "ready" and info.spec]
    try:
        specs = [registry.get_backend(name) for name in names]
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


def _print_scores(rows: list[DemoRow], batch: RecallBatch) -> None:
    contexts, tokens = batch.context.shape
    asked = contexts * batch.questions.shape[1]
    print_line(f"{asked} questions about {contexts} contexts of {tokens} tokens; one question is {1 / asked:.1%}")
    print_line("same tokens: as in full precision; bits held: metadata and room for tokens to come included")
    plain_bytes = next((row.score.memory.full_precision_bytes for row in rows if row.score.memory), None)
    print_table(
        ("backend", "bits", "exact answers", "same tokens", "bits held (K / V)", "cache", "smaller"),
        [(row.case.backend, row.case.bits, *_score_cells(row.score, plain_bytes)) for row in rows],
    )


def _score_cells(score: RecallScore, plain_bytes: int | None) -> tuple[str, ...]:
    rates = f"{score.exact_rate:.1%}", f"{score.agreement:.1%}"
    memory = score.memory
    if memory is None:
        return *rates, "16 / 16", "-" if plain_bytes is None else f"{plain_bytes / 2**20:.2f} MiB", "1.00x"
    bits = " / ".join(
        "-" if side is None else f"{side:.2f}" for side in (memory.effective_bits_key, memory.effective_bits_value)
    )
    return *rates, bits, f"{memory.total_bytes / 2**20:.2f} MiB", f"{memory.compression:.2f}x"


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
        label = f"{one.case.backend} {one.case.bits}" if one.case.config else one.case.backend
        print_line(f"{label:>22}: {said}")
