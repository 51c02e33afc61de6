"""`kvq tune`: a configuration fitted to a model and a budget, layer by layer."""

from __future__ import annotations

import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvq.cli.given_path import find_config_file
from kvq.cli.given_text import check_sizes
from kvq.cli.grid_options import (
    Axes,
    Backends,
    Balances,
    Clips,
    GroupSizes,
    Metadata,
    Rotations,
    make_grid,
    parse_bits,
)
from kvq.cli.model_options import GivenDevice, GivenDtype, GivenModel, describe_given_model, load_given_model
from kvq.cli.outputs import check_outputs, write_output
from kvq.cli.progress import Progress, show_progress
from kvq.cli.resuming import told_how_to_resume
from kvq.cli.tune_report import show_answer, write_front, write_record
from kvq.cli.tune_text import TextOptions, load_texts
from kvq.cli.usage_errors import usage_errors
from kvq.errors import EvaluationError
from kvq.units import parse_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvq.config import KVQCacheConfig
    from kvq.evaluation.quality.processes import Processes
    from kvq.tuning import Goal, Grid, SearchSpace, TunedCache, TuningPlan


def tune(
    model: GivenModel,
    budget: Annotated[
        float | None,
        typer.Option(
            metavar="BITS",
            help="Most bits an element at --context, with metadata, window and sinks.",
            show_default=False,
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Most memory of the cache at --context, e.g. 2GiB.", show_default=False),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option("--max-kl", metavar="NATS", help="Largest divergence: the smallest cache.", show_default=False),
    ] = None,
    context: Annotated[
        int, typer.Option(metavar="INTEGER", min=1, max=1 << 24, help="Tokens that bytes are counted at.")
    ] = 4096,
    backend: Backends = None,
    bits: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Bits to choose from. Default: 1,2,3,4,5,6,8.", show_default=False),
    ] = None,
    axis: Axes = None,
    group_size: GroupSizes = None,
    rotation: Rotations = None,
    balance: Balances = None,
    clip: Clips = None,
    metadata: Metadata = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", metavar="FILE", help="A configuration whose window, sinks and so on are kept."),
    ] = None,
    keep_first: Annotated[int, typer.Option(metavar="INTEGER", min=0, help="First layers kept in full precision.")] = 0,
    keep_last: Annotated[int, typer.Option(metavar="INTEGER", min=0, help="Last layers kept in full precision.")] = 0,
    together: Annotated[
        int, typer.Option(metavar="INTEGER", min=1, help="Neighbouring layers that get the same setting.")
    ] = 1,
    most_settings: Annotated[
        int | None,
        typer.Option(metavar="INTEGER", min=1, help="Most different settings of layers.", show_default=False),
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="A text file to choose on; repeatable.")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            metavar="ID", help="Instead: a text that `kvq eval --dataset` takes. Default: topics-calibration."
        ),
    ] = None,
    held_out_text: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="A text file to verify on; repeatable.")
    ] = None,
    held_out_dataset: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            help="Instead: a text by name. Default: the -report part of --dataset, or the rest of the text.",
        ),
    ] = None,
    sequences: Annotated[
        int, typer.Option(metavar="INTEGER", min=1, max=10_000, help="Sequences of the calibration text.")
    ] = 2,
    held_out_sequences: Annotated[
        int, typer.Option(metavar="INTEGER", min=1, max=10_000, help="Sequences of the held-out text.")
    ] = 4,
    length: Annotated[int, typer.Option(metavar="INTEGER", min=160, help="Tokens of each sequence.")] = 640,
    prefill: Annotated[
        int, typer.Option(metavar="INTEGER", min=16, help="First tokens of each, read at once and not scored.")
    ] = 128,
    step: Annotated[int, typer.Option(metavar="INTEGER", min=1, help="Tokens of each later forward.")] = 32,
    batch_size: Annotated[int, typer.Option(metavar="INTEGER", min=1, help="Sequences read together.")] = 2,
    tries: Annotated[
        int,
        typer.Option(metavar="INTEGER", min=0, help="Whole configurations to measure for exchanges between layers."),
    ] = 14,
    dtype: GivenDtype = "auto",
    device: GivenDevice = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The configuration: a YAML file.")] = Path("tuned.yaml"),
    record: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write everything measured to this JSON file.")
    ] = None,
    front: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write configurations along the whole range into this folder.")
    ] = None,
    parts: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Keep what was measured in this folder: another budget does not measure it again."
        ),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw layers, sides and the front: a PNG, SVG or PDF file.")
    ] = None,
) -> None:
    """Fit a cache to a model and a budget: bits for each layer's keys and values.

    Each candidate is measured alone, in each layer and on each side, while all else stays in full precision: the
    divergence (KL) of the next token on a calibration text. An allocation takes the settings whose sum is least within
    the budget, in exact bytes. Exchanges between layers are then tried on the whole cache, and the answer is measured
    on a held-out text, beside the best uniform configuration of that size.

    --out gets a commented configuration, which `attach`, `KVQ`, `kvq eval`, `kvq plan` and `kvq bench` take. A run that
    was stopped goes on where it was: finished measurements lie beside it. Under `accelerate launch` all processes share
    the work.

    Exit codes: 0 fine; 1 a result cannot be written; 2 wrong usage, or something is missing.
    """
    from kvq.evaluation.quality.processes import Processes

    own_parts = parts is None
    parts = parts or out.with_name(f"{out.name}.parts")
    texts = TextOptions(text, dataset, held_out_text, held_out_dataset, sequences, held_out_sequences, length)
    layers = LayerOptions(keep_first, keep_last, together, most_settings)
    sizes = {"prefill": prefill, "step": step, "batch_size": batch_size, "tries": tries}
    with (
        show_progress("loading the model", hidden=not Processes.is_first()) as progress,
        usage_errors(),
        told_how_to_resume(parts, quiet=not Processes.is_first()),
    ):
        goal = _read_goal(budget, memory, max_kl, context)
        texts.check()
        check_sizes(length, prefill)
        _check_outputs(out, record, picture)
        _check_folder("--front", front)
        _check_folder("--parts", parts)
        base = _read_base(config)
        widths = parse_bits(bits) if bits is not None else ()
        metadata = metadata or _own_metadata(config, base)
        grid = make_grid(backend, widths, axis, group_size, rotation, balance, clip, metadata)
        processes = Processes.find()  # before the model is loaded: it chooses the device of this process
        plan = _make_plan(load_given_model(model, dtype, device, progress), texts, goal, base, layers, grid, sizes)
        answer = _tune(plan, parts, progress, processes)
    if not processes.is_main:
        return
    name, command = describe_given_model(model), _describe_command()
    show_answer(answer, name)
    _write(answer, name, command, out)
    if record is not None:
        write_record(answer, name, command, record)
    if front is not None:
        write_front(answer, name, command, front)
    if picture is not None:
        _draw(answer, picture, name)
    if own_parts:
        shutil.rmtree(parts, ignore_errors=True)


@dataclass(frozen=True)
class LayerOptions:
    """The options about layers.

    Attributes:
        keep_first: first layers kept in full precision.
        keep_last: last layers kept in full precision.
        together: neighbouring layers that get the same setting.
        most_settings: most different settings; None: any number.
    """

    keep_first: int
    keep_last: int
    together: int
    most_settings: int | None

    def make_space(self, model: PreTrainedModel, base: KVQCacheConfig, grid: Grid) -> SearchSpace:
        """Return what an allocation may choose.

        Raises:
            EvaluationError: nothing is left to choose.
        """
        from kvq.tuning import SearchSpace, find_quantizable, group_layers, widen_for_biases

        settings = tuple(widen_for_biases(grid, model).settings())
        groups, kept = group_layers(
            find_quantizable(model, base), together=self.together, keep_first=self.keep_first, keep_last=self.keep_last
        )
        return SearchSpace(settings, settings, groups, kept, self.most_settings)


def _read_goal(budget: float | None, memory: str | None, max_kl: float | None, context: int) -> Goal:
    from kvq.tuning import Goal

    try:
        memory_bytes = None if memory is None else parse_bytes(memory)
    except ValueError as error:
        raise EvaluationError(f"--memory: {error}") from error
    return Goal(context, bits=budget, memory_bytes=memory_bytes, max_kl=max_kl)


def _check_outputs(out: Path, record: Path | None, picture: Path | None) -> None:
    check_outputs(out, picture)
    check_outputs(record, None)
    if record is not None and record.absolute() == out.absolute():
        raise EvaluationError(f"--out and --record are the same file, {str(out)!r}")
    if out.suffix.lower() not in (".yaml", ".yml"):
        raise EvaluationError(f"--out {str(out)!r} is not a YAML file: use .yaml")


def _check_folder(option: str, folder: Path | None) -> None:
    if folder is not None and (not folder.absolute().parent.is_dir() or (folder.exists() and not folder.is_dir())):
        raise EvaluationError(f"{option} {str(folder)!r} cannot be written: give a folder in one that exists")


def _read_base(config: Path | None) -> KVQCacheConfig:
    from kvq.config import KVQCacheConfig
    from kvq.tuning import default_base

    base = default_base() if config is None else KVQCacheConfig.from_file(find_config_file(config))
    if base.layers:
        raise EvaluationError(f"{str(config)!r} has settings of single layers, which tuning chooses; take out 'layers'")
    return base


def _describe_command() -> str:
    """Return the command as it was typed."""
    return shlex.join(["kvq", *sys.argv[1:]])


def _make_plan(
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    texts: TextOptions,
    goal: Goal,
    base: KVQCacheConfig,
    layers: LayerOptions,
    grid: Grid,
    sizes: dict[str, int],
) -> TuningPlan:
    from kvq.tuning import TuningPlan

    model, tokenizer = loaded
    text, held_out = load_texts(texts, model, tokenizer)
    return TuningPlan(model, text, held_out, layers.make_space(model, base, grid), goal, base, **sizes)


def _own_metadata(config: Path | None, base: KVQCacheConfig) -> list[str] | None:
    """Return the dtype of scales and middles that a given configuration has; None without one."""
    if config is None:
        return None
    return [str(base.to_dict()["metadata_dtype"] or "default")]


def _tune(plan: TuningPlan, parts: Path, progress: Progress, processes: Processes) -> TunedCache:
    from kvq.tuning import tune as run

    return run(plan, parts=parts, watcher=progress, processes=processes)


def _write(answer: TunedCache, name: str, command: str, out: Path) -> None:
    from kvq.tuning.tuned_file import describe_tuned

    write_output(out, describe_tuned(answer, name, command))


def _draw(answer: TunedCache, picture: Path, name: str) -> None:
    with usage_errors():
        from kvq.tuning.picture import draw_answer

        draw_answer(answer, picture, name)
