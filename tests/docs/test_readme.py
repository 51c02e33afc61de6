"""README.md is short, its code runs, and its prose agrees with the figures."""

from __future__ import annotations

import re
from pathlib import Path

import demo_tables
import pytest
import run_readme
import torch
from draw_front_page import STEP_DTYPE, collect_steps
from preset_tables import FRONT_RESULT, load_result
from speed_tables import BUFFER

from kvq import KVQ
from kvq.evaluation.demo import QUESTIONS_AT_ONCE
from kvq.evaluation.embedded_model import load_embedded_model
from kvq.evaluation.quality.metrics import Estimate
from kvq.evaluation.recall import QUESTION_LENGTH

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
QUALITY = (ROOT / "docs" / "quality.md").read_text(encoding="utf-8")
MAX_BYTES = 9000
"""What is read once, in a minute."""

BLOCKS = [pytest.param(code, id=f"{page}-{number}") for page, number, code in run_readme.list_blocks()]


@pytest.fixture(scope="module")
def namespace():
    return run_readme.make_namespace()


def test_it_is_short():
    assert len(README.encode()) <= MAX_BYTES, "move what is not for everybody into docs/"


@pytest.mark.parametrize("code", BLOCKS)
def test_a_python_block_runs(code, namespace, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for the blocks that write files
    memory = run_readme.run_block(code, namespace).memory()
    assert ("print(" in code) == (f"{memory.compression:.2f}x smaller" in capsys.readouterr().out)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("cache = None", "no KVQ"),
        ("from kvq import KVQ\ncache = KVQ()", "0 tokens"),
        (
            "from kvq import KVQ\ncache = KVQ(residual_length=10_000)\n"
            "model.generate(**inputs, past_key_values=cache, max_new_tokens=1024)",
            "times smaller",
        ),
    ],
)
def test_a_block_that_does_not_do_what_it_says_is_refused(code, words, namespace):
    with pytest.raises(ValueError, match=words):
        run_readme.run_block(code, namespace)


def test_a_plain_dict_builds_the_same_cache(namespace):
    configuration = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    configs = []
    for code in (run_readme.find_code(README, "python")[1], run_readme.find_code(configuration, "python")[0]):
        names = dict(namespace)
        exec(code.split("model.generate")[0], names)  # noqa: S102  # our own pages
        configs.append(names["cache"].config)
    assert "KVQCacheConfig(" in run_readme.find_code(README, "python")[1]
    assert configs[0] == configs[1]
    assert (configs[0].axis_key, configs[0].axis_value) == ("per_token", "per_token")


def test_the_prose_around_the_demo_agrees_with_its_figures():
    results = demo_tables.load_demo()
    rows = {(row["backend"], row["bits"]): row for row in results["rows"]}
    questions = results["parameters"]["contexts"] * results["parameters"]["questions"]
    assert f"{questions} questions can show" in QUALITY
    assert f"one question is {100 / questions:.1f} points" in QUALITY
    for backend in {name for name, bits in rows if bits != "16 bit"}:
        many_keys, many_values, even = (rows[backend, bits] for bits in ("K4V2", "K2V4", "K4V4"))
        assert many_keys["total_bytes"] == many_values["total_bytes"]
        assert abs(many_keys["exact_rate"] - even["exact_rate"]) * questions <= 1.01
        lost = 1 - many_values["exact_rate"] / many_keys["exact_rate"]
        assert 1 / 40 < lost < 1 / 25, "one answer in thirty or so"
        shares = (torch.tensor(row["exact_by_context"]) for row in (many_keys, many_values))
        difference = Estimate.of_parts(torch.sub(*shares))
        assert 3 <= round(100 * difference.mean) <= 4, "3 to 4 points"
        assert 100 * difference.half_width < 2.5, "give or take 2"


def test_the_demo_was_measured_on_the_store_of_today():
    results = demo_tables.load_demo()
    row = next(row for row in results["rows"] if (row["backend"], row["bits"]) == ("quanto", "K4V2"))
    config = load_embedded_model()[0].config
    contexts, questions = results["parameters"]["contexts"], results["parameters"]["questions"]
    cache = KVQ(model=config)
    forwards = questions // QUESTIONS_AT_ONCE
    for length in (results["context_length"], *[QUESTION_LENGTH * QUESTIONS_AT_ONCE] * forwards):
        states = torch.zeros(contexts, config.num_key_value_heads, length, config.head_dim, dtype=torch.bfloat16)
        for layer in cache.layers:
            layer.update(states, states, packed=True)
    assert cache.memory().total_bytes == row["total_bytes"], "run scripts/update_pages.py --measure"


def test_the_sentence_on_quality_agrees_with_its_figures():
    sentence = " ".join(README.partition("\n## Quality\n")[2].partition("![")[0].split())
    records = load_result(FRONT_RESULT)["records"]
    others = [one for one in records if one["settings"].get("transformers", {}).get("nbits") == 4]
    best = min(others, key=lambda one: one["kl"]["mean"])
    four, three = one_of(records, "4bit"), one_of(records, "3bit")
    assert "a tenth of the KL divergence of transformers' best 4-bit cache, in four fifths of its bytes" in sentence
    assert four["kl"]["mean"] / best["kl"]["mean"] == pytest.approx(0.1, abs=0.01)
    assert four["held_bytes"] / best["held_bytes"] == pytest.approx(4 / 5, abs=0.02)
    assert "3 bits have less than half of it, in two thirds" in sentence
    assert 0.4 < three["kl"]["mean"] / best["kl"]["mean"] < 0.5
    assert three["held_bytes"] / best["held_bytes"] == pytest.approx(2 / 3, abs=0.02)


def one_of(records, label):
    (found,) = (one for one in records if one["label"] == label)
    return found


def test_the_sentence_on_speed_agrees_with_its_figures():
    sentence = " ".join(re.search(r"^With 32,768 tokens.*?\)\.", README, re.DOTALL | re.MULTILINE)[0].split())
    steps = {label: dict(points) for label, points in collect_steps().items()}
    ours, full, theirs = steps["kvq quanto 4, fused"], steps[BUFFER], steps["transformers quanto 4"]
    assert "a sixth of the time" in sentence
    assert ours[32768] / full[32768] == pytest.approx(1 / 6, abs=0.015)
    assert f"a {round(theirs[32768] / ours[32768])}th of the time" in sentence
    assert f"less than half and a {round(theirs[2048] / ours[2048])}th" in sentence
    assert 0.4 < ours[2048] / full[2048] < 0.5
    assert STEP_DTYPE in sentence


@pytest.mark.parametrize("fields", [{}, {"nbits_v": 4}, {"nbits_k": 8, "nbits_v": 4}])
def test_from_about_160_tokens_on_bytes_are_saved(fields):
    def compression(length):
        states = torch.zeros(1, 1, length, 128, dtype=torch.bfloat16)
        cache = KVQ(**fields)
        cache.update(states, states, 0)
        return cache.memory().compression

    assert compression(90) < 1
    assert compression(140) < 1, "the window has opened room for 64 more tokens"
    assert min(compression(length) for length in (*range(160, 260, 4), 193, 257)) > 1


def test_no_text_installs_the_package_of_the_same_name_from_the_index():
    folders = ("kvq", "kvq_backends", "plugins", "docs", "examples", "scripts", "tests", "benchmarks", ".github", ".ci")
    files = [path for path in ROOT.iterdir() if path.is_file()]
    files += [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    suffixes = {".md", ".py", ".toml", ".yaml", ".yml", ".cff", ".txt", ".json", ".sh", ""}
    wrong = re.compile(r"pip3? install\s+(?:-\S+\s+)*['\"]?kvq(?![\w./-]|\[\w+\] @ )")
    assert wrong.search("pip install" + " -U kvq[plot]")  # the pattern sees what it looks for
    texts = {path: path.read_text(encoding="utf-8", errors="replace") for path in files if path.suffix in suffixes}
    assert [str(path) for path, text in texts.items() if wrong.search(text)] == []
    assert ROOT / "README.md" in texts
