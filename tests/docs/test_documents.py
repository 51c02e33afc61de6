"""Every document says what is so: its code runs, its commands and options exist, and nothing public is left out."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import run_readme
import torch
import typer
import yaml

import kvq
import kvq.plugin_api
import kvq.testing
from kvq import KVQCacheConfig, LayerConfig, register_backend
from kvq.cli import app
from kvq.evaluation.embedded_model import EMBEDDED_MODEL_PATH, load_embedded_model
from kvq.evaluation.recall import decode_tokens, sample_recall_batch
from kvq.registry import BackendRegistry, get_registry

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "plugins").glob("**/README.md")),
]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
"""Their blocks build on each other."""
RUN_BY_READER = {ROOT / page for page in run_readme.PAGES}
"""Their Python blocks run in test_readme.py, and outside the checkout."""
RUN_BY_PLUGIN = {ROOT / "plugins" / "kvq-torchao" / "README.md"}
"""They need a vendor's library, which `make plugin` alone installs; the plugin's own tests run them."""
RUN_BY_STORY = {ROOT / "docs" / "third-party.md"}
"""Its blocks are files and commands that build on each other; tests/plugins/test_third_party_story.py runs them."""
PLUGINS = {path.parent.name: path.parent for path in sorted((ROOT / "plugins").glob("*/pyproject.toml"))}
COMMANDS = typer.main.get_command(app).commands
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
NOT_RUN = {
    "sh": "run by tests/plugins/test_five_steps.py and test_third_party_story.py",
    "": "a command for a terminal, named below",
    "text": "what a command printed, in a generated block",
    "bibtex": "a citation",
}


def blocks(*languages):
    """Return (document, number, text) for each block of those languages."""
    return [
        pytest.param(path, text, id=f"{path.relative_to(ROOT)}-{number}")
        for path in DOCUMENTS
        for number, (language, text) in enumerate(FENCE.findall(path.read_text(encoding="utf-8")))
        if language in languages
    ]


@pytest.fixture
def plugins_registered(monkeypatch):
    """The plugins of the tree as registered backends, installed or not."""
    monkeypatch.setattr("kvq.registry.registry._registry", BackendRegistry(environment={"KVQ_BLOCK_PLUGINS": ""}))
    known = {info.name for info in get_registry().available_backends()}
    for name, folder in PLUGINS.items():
        if name.removeprefix("kvq-") not in known:
            monkeypatch.syspath_prepend(str(folder / "src"))
            register_backend(importlib.import_module(f"{name.replace('-', '_')}.plugin").kvq_backend())


@pytest.fixture(scope="module")
def namespace():
    model, tokenizer = load_embedded_model()
    batch = sample_recall_batch(1, 60, 1, generator=torch.Generator().manual_seed(3))
    prompt = decode_tokens([*batch.context[0].tolist(), *batch.questions[0, 0, :2].tolist()])
    inputs = tokenizer(prompt, return_tensors="pt")
    return {"model": model, "inputs": inputs, "path": EMBEDDED_MODEL_PATH, "prompt": prompt}


def test_every_language_is_one_that_is_checked():
    languages = {
        language for path in (*DOCUMENTS, *TUTORIALS) for language, _ in FENCE.findall(path.read_text(encoding="utf-8"))
    }
    assert languages - {"python", "yaml", "console", "toml", *NOT_RUN} == set()


@pytest.mark.parametrize(
    ("path", "text"),
    [one for one in blocks("python") if one.values[0] not in RUN_BY_READER | RUN_BY_PLUGIN | RUN_BY_STORY],
)
def test_a_python_block_runs(path, text, namespace, plugins_registered):
    names = dict(namespace)
    exec(text.replace("max_new_tokens=1024", "max_new_tokens=20"), names)  # noqa: S102  # our own documents
    if "model.generate" in text:
        assert (names["attachment"].cache if "attachment" in names else names["cache"]).memory().packed_bytes > 0


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.name)
def test_a_tutorial_runs(path, plugins_registered, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for those that write files
    text = path.read_text(encoding="utf-8")
    names = {}
    for language, code in FENCE.findall(text):
        assert language == "python"
        exec(compile(code, path.name, "exec"), names)  # noqa: S102  # our own documents
    assert text.count("\nassert ") + text.count("    assert ") >= 3, "it shows nothing"


@pytest.mark.parametrize(("path", "text"), [one for one in blocks("yaml") if one.values[0] not in RUN_BY_STORY])
def test_a_yaml_block_is_a_configuration(path, text):
    assert KVQCacheConfig.from_mapping(yaml.safe_load(text)).version == 1


@pytest.mark.parametrize(("path", "text"), blocks("toml"))
def test_a_toml_block_is_that_of_the_template(path, text):
    template = (PLUGINS["kvq-template"] / "pyproject.toml").read_text(encoding="utf-8")
    assert text.strip() in template.replace("template", "mine")


def find_commands(text):
    """Return the commands of a block, without comments: its lines with a prompt, or all where none has one."""
    lines = [line for line in text.splitlines() if line.strip()]
    prompted = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return [re.sub(r"\s+#.*", "", line) for line in prompted or lines]


def find_options(command):
    return {name for one in COMMANDS[command].params for name in (*one.opts, *one.secondary_opts)}


@pytest.mark.parametrize(("path", "text"), blocks("console", ""))
def test_a_command_exists(path, text):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = find_commands(text)
    assert commands
    for command in commands:
        assert not re.search("[<>]", re.sub("'[^']*'", "", command)), "a shell would redirect"
        program, *arguments = command.split()
        if program == "make":
            assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in arguments), arguments
        elif program == "pip":
            folders = [path.parent if word == "." else ROOT / word for word in arguments if "/" in word or word == "."]
            assert folders
            assert all((folder / "pyproject.toml").is_file() for folder in folders), arguments
        elif program == "pytest":
            assert (path.parent / "tests").is_dir()
        elif program == "python":
            assert arguments[0] == "-m"
            assert importlib.util.find_spec(arguments[1])
        else:
            assert program == "kvq", program
            assert {word for word in arguments if word.startswith("-")} <= find_options(arguments[0])
        named = re.findall(r"[^ =,]+\.yaml", re.sub(r"--out \S+", "", command))  # what is written need not be there
        assert all((ROOT / word).is_file() for word in named), named


class TestCommands:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")

    def test_every_one_is_there(self):
        commands = [command.split() for language, text in FENCE.findall(self.page) for command in find_commands(text)]
        assert {words[1] for words in commands if words[0] == "kvq"} == set(COMMANDS)
        assert all(f"| `kvq {name}` |" in self.page for name in COMMANDS)

    def test_options_named_beside_a_command_exist(self):
        named = [
            (line.split()[2], option)
            for line in self.page.splitlines()
            if line.startswith("$ kvq ")
            for option in re.findall(r"--[a-z-]+", line.partition("#")[2])
        ]
        assert len(named) >= 6
        assert [pair for pair in named if pair[1] not in find_options(pair[0])] == []


class TestNothingIsLeftOut:
    @pytest.mark.parametrize("plugin", sorted(set(PLUGINS) - {"kvq-template"}))
    def test_options_of_the_plugins(self, plugin, plugins_registered):
        text = (PLUGINS[plugin] / "README.md").read_text(encoding="utf-8")
        options = get_registry().get_backend(plugin.removeprefix("kvq-")).options.model_fields
        assert options
        assert [name for name in options if name not in text] == []

    def test_hooks_and_names_of_the_plugin_api(self):
        text = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
        hooks = [name for name, thing in vars(kvq.plugin_api.hooks).items() if hasattr(thing, "kvq_spec")]
        assert hooks == ["kvq_backend"]
        names = [*hooks, *kvq.plugin_api.__all__, *kvq.testing.__all__]
        assert [name for name in names if f"`{name}`" not in text] == []

    def test_commands_and_their_options_have_help(self):
        for name, command in COMMANDS.items():
            assert command.help, name
            assert [parameter.name for parameter in command.params if not getattr(parameter, "help", "x")] == []


class TestSchema:
    schema = ROOT / "docs" / "kvq-config.schema.json"

    def test_it_is_current(self):
        spec = importlib.util.spec_from_file_location("write_schema", ROOT / "scripts" / "write_schema.py")
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        assert self.schema.read_text(encoding="utf-8") == script.render_schema(), "run scripts/write_schema.py"

    def test_it_knows_every_field_with_its_description(self):
        schema = json.loads(self.schema.read_text(encoding="utf-8"))
        for fields, described in (
            (
                KVQCacheConfig.model_fields,
                {name: one for name, one in schema["properties"].items() if name != "preset"},
            ),
            (LayerConfig.model_fields, schema["$defs"]["LayerConfig"]["properties"]),
        ):
            assert {name: one["description"] for name, one in described.items()} == {
                name: field.description for name, field in fields.items()
            }
        assert schema["additionalProperties"] is False

    def test_the_public_names_of_the_kit_are_sorted_and_there(self):
        assert kvq.testing.__all__ == sorted(kvq.testing.__all__, key=lambda name: (not name.isupper(), name))
        assert all(hasattr(kvq.testing, name) for name in kvq.testing.__all__)
        assert "kvq.testing" in sys.modules
