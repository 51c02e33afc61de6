"""Configurations that no honest person writes: refused with their place, in a message that fits on a screen."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch

import kvq.errors
from kvq import KVQ, KVQCacheConfig
from kvq.errors import ConfigError, Fault, KVQError, UnknownBackendError, shorten

LOOP = {}
LOOP["again"] = LOOP
RING = []
RING.append(RING)
LONG = "x" * 1_000_000
DIGITS = 10**400
ENDLESS = 10**5000  # more digits than Python writes out
SURROGATE = "\ud800"


def refuse(fields, error=KVQError):
    with pytest.raises(error) as caught:
        KVQCacheConfig.from_mapping(fields)
    assert_on_a_screen(str(caught.value))
    return str(caught.value)


def assert_on_a_screen(text):
    assert len(text) <= 2000, len(text)
    assert text.count("\n") < 25
    text.encode("utf-8", "backslashreplace")


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"layers": {0: {4: "x"}}}, "layers['0']: 4 is not accepted as a key"),
        ({"layers": {"0": {None: 1}}}, "layers['0']: None is not accepted as a key"),
        ({"layers": {0: {"q_group_size": {4: 1}}}}, "layers['0'].q_group_size: 4 is not accepted as a key"),
        ({"layers": {0: {"backend": {"key": {True: "x"}}}}}, "layers['0'].backend.key: True is not accepted as a key"),
        ({"layers": {True: {}}}, "layers: True is not accepted: an index"),
        ({"layers": {None: {}}}, "layers: None is not accepted: an index"),
        ({"layers": {(0, 1): {}}}, "layers: (0, 1) is not accepted: an index"),
        ({"layers": {0.5: {}}}, "layers: 0.5 is not accepted: an index"),
        ({"layers": {ENDLESS: {}}}, "layers"),
        ({"layers": {LONG: {}}}, "layers["),
        ({"layers": {0: {LONG: 1}}}, "is unknown"),
        ({"q_group_size": {4: 8}}, "q_group_size: 4 is not accepted as a key"),
        ({"backend_options": {4: {}}}, "backend_options: 4 is not accepted as a key"),
        ({"backend_options": {"hqq": {4: 1}}}, "backend_options.hqq: 4 is not accepted as a key"),
        ({"backend_options": {"hqq": {"optimize": [{4: 1}]}}}, "backend_options.hqq.optimize[0]: 4 is not"),
        ({LONG: 1}, "is unknown"),
        ({4: 1}, "the keys must be names of fields, got [4]"),
    ],
)
@pytest.mark.case(
    "keys that are no strings: in an entry of `layers`, in options, nested deeper",
    "ConfigError with the path of the mapping that holds them",
)
def test_keys_that_are_no_names(fields, place):
    assert place in refuse(fields, ConfigError)


FIELDS = ["version", "backend", "nbits_k", "axis_key", "q_group_size", "residual_length", "sink_length", "rotation_k",
          "compute_dtype", "metadata_dtype", "device", "sliding", "layers", "backend_options"]  # fmt: skip
VALUES = {
    "long": LONG, "digits": DIGITS, "negative": -DIGITS, "endless": ENDLESS, "nan": math.nan, "inf": math.inf,
    "bytes": b"\xff" * 100_000, "surrogate": SURROGATE, "loop": LOOP, "ring": RING, "set": {1, 2}, "none": object(),
    "wide": ["x"] * 50_000, "long list": [LONG] * 3, "complex": 4j, "nul": "a\0b",
}  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("name", VALUES)
@pytest.mark.case(
    "NaN, infinity, 10**400, 10**5000, bytes, surrogates, a megabyte, values that hold themselves, in every field",
    "ConfigError with the field, in at most 2,000 characters and 25 lines",
)
def test_no_value_gets_past_a_field(field, name):
    for fields, place in ({field: VALUES[name]}, field), ({"layers": {"0": {field: VALUES[name]}}}, "layers"):
        text = refuse(fields)
        assert place in text or "backend" in text


@pytest.mark.parametrize("value", [LOOP, RING, [[[LOOP]]], {"a": [RING]}])
def test_a_value_that_holds_itself_is_told_from_its_field(value):
    assert refuse({"backend_options": {"hqq": {"optimize": value}}}, ConfigError).startswith("backend_options.hqq")


def laughs(levels=10):
    lines = ["a0: &a0 [ha, ha, ha, ha, ha, ha, ha, ha, ha, ha]"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]")
    return "\n".join([*lines, f"residual_length: *a{levels - 1}"])


FILES = {
    "list of itself.yaml": ("&a [*a]", "a mapping of fields is needed"),
    "mapping of itself.yaml": ("a: &a {b: *a}", "hold themselves"),
    "key of itself.yaml": ("layers: &a {0: *a}", "hold themselves"),
    "laughs.yaml": (laughs(), "holds more than 10,000 values"),
    "python.yaml": ("residual_length: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
    "tag.yaml": ("residual_length: !mine 4", "could not determine a constructor"),
    "binary.yaml": ("backend: !!binary aGVsbG8=", "backend: b'hello' is not accepted"),
    "set.yaml": ("residual_length: !!set {a, b}", "residual_length: {'"),
    "date.yaml": ("residual_length: 2020-01-01", "residual_length: datetime.date(2020, 1, 1)"),
    "list as key.yaml": ("? [a]\n: 1", "the file cannot be parsed"),
    "number as key.yaml": ("layers: {0: {4: x}}", "layers['0']: 4 is not accepted as a key"),
    "true as key.yaml": ("layers: {true: {nbits_k: 8}}", "layers: True is not accepted"),
    "null as key.yaml": ("layers: {0: {~: 8}}", "layers['0']: None is not accepted as a key"),
    "deep.yaml": ("[" * 1000, "the file cannot be parsed"),
    "deep.json": ('{"a":' * 100_000, "the file cannot be parsed"),
    "nan.yaml": ("residual_length: .nan", "residual_length: nan"),
    "inf.json": ('{"nbits_k": Infinity}', "nbits_k: inf"),
    "digits.json": ('{"residual_length": 1' + "0" * 400 + "}", "residual_length: 1000"),
    "endless.json": ('{"residual_length": 1' + "0" * 5000 + "}", "the file cannot be parsed"),
    "surrogate.json": ('{"backend": "\\ud800"}', "'\\ud800' is unknown"),
    "long.json": (json.dumps({"sliding": LONG}), "sliding: 'xxx"),
    "long key.json": (json.dumps({LONG: 1}), "is unknown"),
    "many faults.json": (json.dumps({f"x{number}": 1 for number in range(500)}), "500 faults"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    for name, (text, _) in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("name", FILES)
@pytest.mark.case(
    "YAML anchors that hold themselves, a billion laughs, custom tags, keys that are no strings, deep nesting",
    "ConfigError that names file and place; `kvq check` and `kvq plan` print it and exit",
)
def test_a_strange_file(folder, name, monkeypatch, capsys):
    from kvq.cli import main

    path, words = folder / name, FILES[name][1]
    with pytest.raises(KVQError) as caught:
        KVQ(path)
    text = str(caught.value)
    assert_on_a_screen(text)
    assert words in text
    assert name in text
    for arguments, code in ((["check", str(path)], 1), (["plan", "--model", "embedded", "--context", "9"], 2)):
        monkeypatch.setattr(sys, "argv", ["kvq", *arguments, *(["--config", str(path)] if code == 2 else [])])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        assert (ended.value.code, printed.out) == (code, "")
        assert_on_a_screen(printed.err)
        assert "Traceback" not in printed.err


@pytest.mark.parametrize("path", ["a\0b.yaml", "~nobody-of-that-name/a.yaml", "x" * 5000 + ".yaml", SURROGATE])
@pytest.mark.case(
    "a path that is no path: a NUL, the home of nobody, 5,000 characters, a surrogate",
    "ConfigError; `kvq check` and `kvq plan` exit with 2",
)
def test_a_strange_path(path, monkeypatch, capsys):
    from kvq.cli import main

    with pytest.raises(ConfigError, match="the file cannot be read") as caught:
        KVQ(path)
    assert_on_a_screen(str(caught.value))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for arguments in (["check", f"./{path}"], ["plan", "--model", path, "--context", "9"]):
        monkeypatch.setattr(sys, "argv", ["kvq", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        assert ended.value.code == 2
        assert_on_a_screen(printed.err)
        assert "Traceback" not in printed.err


def test_every_error_of_kvq_fits_on_a_screen():
    classes = [one for one in vars(kvq.errors).values() if isinstance(one, type) and issubclass(one, KVQError)]
    assert len(classes) > 15
    for one in classes:
        for text in (LONG, "line\n" * 1000):
            error = one([Fault((LONG,), text)] * 60, LONG) if one is ConfigError else one(text)
            assert_on_a_screen(str(error))
            assert "more" in str(error)
            if one is not ConfigError:
                assert error.args == (text,)


def test_cutting_says_what_was_left_out_and_leaves_the_rest_alone():
    assert shorten("x" * 2000) == "x" * 2000
    cut = shorten("x" * 2001)
    kept = len(cut) - len(cut.lstrip("x"))
    assert cut == f"{'x' * kept} ... {2001 - kept} more characters"
    assert shorten("a\nb\nc\nd", lines=3) == "a\nb\n... 2 more lines"


def test_a_backend_of_a_long_name_is_unknown_in_few_words():
    with pytest.raises(UnknownBackendError) as caught:
        KVQ(backend=LONG)
    assert_on_a_screen(str(caught.value))


def test_states_of_many_dimensions_are_told_of_in_few_words():
    with pytest.raises(KVQError) as caught:
        KVQ().update(torch.zeros([1] * 60), torch.zeros([1] * 60), 0)
    assert_on_a_screen(str(caught.value))
