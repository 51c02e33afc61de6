"""README.md says what is so: its code runs, its commands exist, its tables are current."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import run_readme
import torch
import typer
import yaml

from kvq import KVQ, KVQCacheConfig
from kvq.cli import app
from kvq.evaluation.demo import QUESTIONS_AT_ONCE
from kvq.evaluation.embedded_model import load_embedded_model
from kvq.evaluation.quality.metrics import Estimate
from kvq.evaluation.recall import QUESTION_LENGTH

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def load_script():
    spec = importlib.util.spec_from_file_location("update_readme", ROOT / "scripts" / "update_readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def find_code(language):
    return run_readme.find_code(README, language)


def find_commands():
    lines = [line for block in find_code("console") for line in block.splitlines()]
    return [re.sub(r"\s+#.*", "", line[2:]) for line in lines if line.startswith("$ ")]


script = load_script()


@pytest.fixture(scope="module")
def namespace():
    return run_readme.make_namespace()


@pytest.mark.parametrize("name", script.BLOCKS)
def test_a_generated_block_is_current(name):
    found = re.search(f"<!-- begin: {name} -->\n(.*?)\n<!-- end: {name} -->", README, re.DOTALL)
    assert found, f"README.md has no block {name!r}"
    assert found[1] == script.BLOCKS[name](), "run scripts/update_readme.py"


def test_what_the_script_would_write_is_what_is_there():
    assert script.update(README) == README


def test_the_script_refuses_a_block_that_it_does_not_know():
    with pytest.raises(ValueError, match="'nonsense'"):
        script.update("<!-- begin: nonsense -->\n<!-- end: nonsense -->")


def test_the_script_refuses_a_block_without_an_end():
    with pytest.raises(ValueError, match="'backends' once, with its end"):
        script.update("<!-- begin: backends -->\n")


def test_a_stale_block_is_seen():
    stale = re.sub(r"\| `residual_length` \| `\d+`", "| `residual_length` | `1`", README)
    assert stale != README
    assert script.update(stale) == README


@pytest.mark.parametrize("code", find_code("python"), ids=range(len(find_code("python"))))
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


def test_the_two_caches_of_the_proposal_are_equal(namespace):
    configs = []
    for code in find_code("python")[1:3]:
        names = dict(namespace)
        exec(code.split("model.generate")[0], names)  # noqa: S102  # our own README
        configs.append(names["cache"].config)
    assert len(configs) == 2
    assert configs[0] == configs[1]
    assert (configs[0].axis_key, configs[0].axis_value) == ("per_token", "per_token")


@pytest.mark.parametrize("text", find_code("yaml"))
def test_a_yaml_block_is_a_configuration(text):
    config = KVQCacheConfig.from_mapping(yaml.safe_load(text))
    assert KVQCacheConfig.from_mapping(yaml.safe_load(config.to_yaml())) == config


@pytest.mark.parametrize("command", find_commands())
def test_a_command_exists(command):
    assert not re.search("[<>]", re.sub("'[^']*'", "", command)), "a shell would redirect"
    program, *arguments = command.split()
    if program == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in arguments)
        return
    if program == "python":
        assert arguments[0] == "-m"
        assert importlib.util.find_spec(arguments[1])
        paths = re.findall(r"=([^=,]+\.yaml)", command)
        assert paths
        assert all((ROOT / path).is_file() for path in paths)
        return
    assert program == "kvq"
    assert arguments[0] in typer.main.get_command(app).commands
    assert all((ROOT / path).is_file() for path in arguments if "/" in path)


def test_every_command_of_the_program_is_mentioned():
    mentioned = {command.split()[1] for command in find_commands() if command.startswith("kvq ")}
    assert mentioned == set(typer.main.get_command(app).commands)


def test_options_named_beside_a_command_exist():
    commands = typer.main.get_command(app).commands
    found = 0
    for line in "\n".join(find_code("console")).splitlines():
        command, _, comment = line.partition("#")
        for option in re.findall(r"--[a-z-]+", comment):
            known = [name for parameter in commands[command.split()[2]].params for name in parameter.opts]
            assert option in known, line
            found += 1
    assert found >= 6


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)]+)\)", README))))
def test_a_link_leads_somewhere(link):
    if link.startswith("https://"):
        return
    path, _, anchor = link.partition("#")
    assert (ROOT / path).exists()
    if anchor:
        headings = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in {heading.lower().replace(" ", "-") for heading in headings}


def test_no_text_installs_the_package_of_the_same_name_from_the_index():
    folders = ("kvq", "kvq_backends", "plugins", "examples", "scripts", "tests", "benchmarks", ".github", ".ci")
    files = [path for path in ROOT.iterdir() if path.is_file()]
    files += [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    suffixes = {".md", ".py", ".toml", ".yaml", ".yml", ".cff", ".txt", ".json", ".sh", ""}
    wrong = re.compile(r"pip3? install\s+(?:-\S+\s+)*['\"]?kvq(?![\w./-])")
    assert wrong.search("pip install" + " -U kvq[plot]")  # the pattern sees what it looks for
    texts = {path: path.read_text(encoding="utf-8", errors="replace") for path in files if path.suffix in suffixes}
    assert [str(path) for path, text in texts.items() if wrong.search(text)] == []
    assert ROOT / "README.md" in texts


def test_the_prose_around_the_demo_agrees_with_its_figures():
    results = json.loads(script.DEMO_RESULTS.read_text())
    rows = {(row["backend"], row["bits"]): row for row in results["rows"]}
    questions = results["parameters"]["contexts"] * results["parameters"]["questions"]
    assert f"{questions} questions can show" in README
    assert f"one question is {100 / questions:.1f} points" in README
    for backend in {name for name, bits in rows if bits != "16 bit"}:
        many_keys, many_values, even = (rows[backend, bits] for bits in ("K4V2", "K2V4", "K4V4"))
        assert many_keys["total_bytes"] == many_values["total_bytes"]
        assert abs(many_keys["exact_rate"] - even["exact_rate"]) * questions <= 1.01
        assert 0.2 < 1 - many_values["exact_rate"] / many_keys["exact_rate"] < 0.3  # "a quarter of the answers"
        shares = (torch.tensor(row["exact_by_context"]) for row in (many_keys, many_values))
        difference = Estimate.of_parts(torch.sub(*shares))
        assert 23 <= round(100 * difference.mean) <= 27, "23 to 27 points"
        assert 100 * difference.half_width < 6.5, "give or take 6"


def test_the_demo_was_measured_on_the_store_of_today():
    results = json.loads(script.DEMO_RESULTS.read_text())
    row = next(row for row in results["rows"] if (row["backend"], row["bits"]) == ("quanto", "K4V2"))
    config = load_embedded_model()[0].config
    contexts, questions = results["parameters"]["contexts"], results["parameters"]["questions"]
    cache = KVQ(model=config)
    forwards = questions // QUESTIONS_AT_ONCE
    for length in (results["context_length"], *[QUESTION_LENGTH * QUESTIONS_AT_ONCE] * forwards):
        states = torch.zeros(contexts, config.num_key_value_heads, length, config.head_dim, dtype=torch.bfloat16)
        for layer in cache.layers:
            layer.update(states, states, packed=True)
    assert cache.memory().total_bytes == row["total_bytes"], "run scripts/update_readme.py --measure"


@pytest.mark.parametrize("fields", [{}, {"nbits_v": 4}, {"nbits_k": 8, "nbits_v": 4}])
def test_from_about_200_tokens_on_bytes_are_saved(fields):
    def compression(length):
        states = torch.zeros(1, 1, length, 128, dtype=torch.bfloat16)
        cache = KVQ(**fields)
        cache.update(states, states, 0)
        return cache.memory().compression

    assert compression(180) < 1 < compression(230)
