"""The examples run, offline and from any folder, and print what they promise."""

from __future__ import annotations

import io
import json
import re
import runpy
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.cli.serve import Serve
from transformers.cli.serving.model_manager import ModelManager

from kvq import KVQ, KVQCacheConfig, available_backends
from kvq.errors import ConfigError
from kvq.evaluation.model_loading import find_model_path, load_model
from kvq.evaluation.recall import decode_tokens, sample_recall_batch
from kvq.registry import BackendRegistry

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
CONFIGS = sorted((ROOT / "examples" / "configs").glob("*.yaml"))


@pytest.fixture
def run_here(monkeypatch, capsys):
    """Return a function that runs an example in this process, which spares the imports, and returns what it prints."""

    def call(name, *arguments, typed=""):
        path = ROOT / "examples" / name
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        monkeypatch.setattr(
            "kvq.registry.registry._registry", BackendRegistry()
        )  # what is registered ends with the test
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    return call


def said(label, text):
    """Return what stands behind each `label:` of an output, as words."""
    return [line.replace(".", " ").split() for line in re.findall(rf"^{label}: +(.+)$", text, re.MULTILINE)]


def token_counts(text):
    return [int(count) for count in re.findall(r"^\[(\d+) tokens", text, re.MULTILINE)]


def test_every_example_is_tested_and_described():
    assert [path.name for path in EXAMPLES] == [
        "chat.py",
        "compare_backends.py",
        "custom_backend.py",
        "long_document_qa.py",
        "quickstart.py",
        "serve.py",
        "transformers_serve.py",
        "tuned.py",
    ]
    described = (ROOT / "examples" / "README.md").read_text()
    assert [path.name for path in (*EXAMPLES, *CONFIGS) if path.name not in described] == []


@pytest.mark.slow
def test_quickstart_answers_and_reports(run_here):
    printed = run_here("quickstart.py")
    assert said("generated", printed) == said("right", printed)
    assert len(said("right", printed)[0]) == 4
    assert float(re.search(r"full precision: ([\d.]+)x smaller", printed)[1]) > 2


@pytest.mark.costly
def test_an_example_runs_from_another_folder_without_network(run_example):
    printed = run_example("quickstart.py")
    assert said("generated", printed) == said("right", printed)


@pytest.mark.slow
def test_chat_answers_each_turn_from_one_cache(run_here):
    printed = run_here("chat.py")
    assert said("model", printed) == said("right", printed)
    assert len(said("model", printed)) == 5
    # 30 records, the question, the answer and its full stop, of which the last token is fed with the next turn.
    assert token_counts(printed) == [187 * turn for turn in range(1, 6)]
    assert "quanto 4 bit" in printed


@pytest.mark.slow
@pytest.mark.costly
def test_compare_backends_shows_every_usable_one(run_here):
    printed = run_here("compare_backends.py")
    rates = {name.strip(): float(rate) for name, rate in re.findall(r"^(.{22}) +([\d.]+)%", printed, re.MULTILINE)}
    ready = {backend.name for backend in available_backends(load=True) if backend.origin == "kvq"}
    assert {"full precision", *(f"{name} K4V2" for name in ready)} <= set(rates)
    assert {"hqq", "quanto"} <= ready
    assert min(rates.values()) >= 90


@pytest.mark.slow
def test_custom_backend_generates(run_here):
    printed = run_here("custom_backend.py")
    assert said("generated", printed) == said("right", printed)
    assert "clipping 5" in printed
    assert "clipping 3 bit" in printed


@pytest.mark.slow
def test_long_document_qa_answers_and_reads_once(run_here, tmp_path):
    first = run_here("long_document_qa.py", "--cache", tmp_path / "document.safetensors")
    assert said("answer", first) == said("right", first)
    assert len(said("answer", first)) == 8
    assert "read now: 961 tokens" in first
    again = run_here("long_document_qa.py", "--cache", tmp_path / "document.safetensors")
    assert "read before:" in again
    assert again.partition("loaded:")[2] == first.partition("loaded:")[2]


def test_long_document_qa_takes_another_model_and_document(run_here, foreign_model, tmp_path):
    (tmp_path / "text.txt").write_text("abc" * 200)
    printed = run_here(
        "long_document_qa.py", "--model", foreign_model, "--document", tmp_path / "text.txt", "--question", "What?",
        "--max-new-tokens", 6,
    )  # fmt: skip
    assert "loaded: 600 tokens" in printed
    assert printed.count("question:") == 1


def test_custom_backend_takes_another_model(run_here, foreign_model):
    printed = run_here("custom_backend.py", "--model", foreign_model, "--max-new-tokens", 5, "--reach", 1.5)
    assert "clipping 3 bit" in printed


def test_quickstart_takes_another_model_and_a_configuration(run_here, foreign_model):
    config = ROOT / "examples" / "configs" / "k8v4.yaml"
    printed = run_here(
        "quickstart.py", "--model", foreign_model, "--config", config, "--prompt", "abc" * 200, "--max-new-tokens", 7
    )
    assert "600 tokens" in printed
    assert "right:" not in printed
    assert re.search(r"quanto 8 bit.*quanto 4 bit.* 606 ", printed)


def test_compare_backends_compares_texts(run_here, foreign_model):
    printed = run_here("compare_backends.py", "--model", foreign_model, "--nbits-v", 4, "--max-new-tokens", 6)
    counts = dict(re.findall(r"^(\w+) K4V4: (\d+) of 6 tokens", printed, re.MULTILINE))
    assert {"hqq", "quanto"} <= set(counts)


def test_compare_backends_says_who_is_left_out(run_here, foreign_model):
    printed = run_here("compare_backends.py", "--model", foreign_model, "--nbits-k", 3, "--max-new-tokens", 3)
    assert re.search(r"quanto is left out: nbits_k: 3.* not supported", printed)
    assert "hqq K3V2" in printed


def test_chat_takes_turns_from_the_keyboard(run_here):
    printed = run_here("chat.py", "--interactive", typed="? Dolo\n? Nobody\n\nnever read\n")
    records = dict(re.findall(r"(\w+) (\w+ \w+ \w+ \w+)\.", printed))
    assert f"model: {records['Dolo']} ." in printed
    assert "not in its vocabulary: Nobody" in printed
    assert len(token_counts(printed)) == 1


def test_chat_takes_another_model(run_here, foreign_model):
    printed = run_here("chat.py", "--model", foreign_model, "--max-new-tokens", 8)
    counts = token_counts(printed)
    assert len(counts) == 3
    assert counts == sorted(counts)
    assert "quanto 4 bit" in printed


def test_chat_replies_as_if_each_turn_were_read_anew(foreign_model):
    """The template writes old replies in another way than they were generated, so that the cache has to be cropped."""
    parts = runpy.run_path(str(ROOT / "examples" / "chat.py"), run_name="chat")
    model = AutoModelForCausalLM.from_pretrained(foreign_model).eval()
    tokenizer = AutoTokenizer.from_pretrained(foreign_model)
    chat = parts["Chat"](model, tokenizer, max_new_tokens=12)
    chat.cache = KVQ(model=model, residual_length=4096)
    for message in parts["MESSAGES"]:
        chat.say(message)
        encoded = tokenizer.apply_chat_template(
            chat.messages[:-1], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        expected = model.generate(**encoded, max_new_tokens=12, do_sample=False)
        assert len(set(expected[0, -12:].tolist())) >= 4, "a reply that says too little to prove anything"
        assert torch.equal(chat.fed, expected[0])


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_help_names_the_common_options(path, run_here, capsys):
    with pytest.raises(SystemExit) as left:
        run_here(path.name, "--help")
    assert left.value.code == 0
    printed = capsys.readouterr().out
    if path.name == "transformers_serve.py":
        assert "transformers serve" in printed, "it has the options of that command"
        return
    assert "--model" in printed
    assert "--max-new-tokens" in printed


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_configuration_survives_a_round_trip(path):
    config = KVQCacheConfig.from_file(path)
    assert f"k{config.nbits_k}v{config.nbits_v}" == path.stem
    assert KVQCacheConfig.from_mapping(yaml.safe_load(config.to_yaml())) == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_configuration_saves_what_its_comment_says(path):
    claimed = float(re.search(r"([\d.]+) times smaller than bfloat16 at 16,384 tokens", path.read_text())[1])
    states = torch.randn(1, 1, 16384, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    cache = KVQ(path)
    cache.update(states, states, 0)
    assert cache.memory().compression == pytest.approx(claimed, abs=0.1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*nbits_k.*is below.*nbits_v")
def test_tuned_keeps_to_its_budget_and_generates_with_the_file(run_here, tmp_path):
    printed = run_here("tuned.py", "--bits", 4.2, "--out", tmp_path / "own.yaml")
    assert float(re.search(r"^bits: +([\d.]+) an element", printed, re.MULTILINE)[1]) <= 4.2
    assert len(re.findall(r"^layer \d: \d bits for keys, \d for values$", printed, re.MULTILINE)) == 3
    config = KVQCacheConfig.from_file(tmp_path / "own.yaml")
    chosen = re.findall(r"^layer (\d): (\d) bits for keys", printed, re.MULTILINE)
    assert [config.for_layer(int(index)).key.nbits for index, _ in chosen] == [int(bits) for _, bits in chosen]
    assert re.search(r"^generated: .*\w", printed, re.MULTILINE)


class TestServe:
    def test_later_questions_spare_the_document(self, run_here):
        printed = run_here("serve.py")
        assert said("answer", printed) == said("right", printed)
        counts = [(int(all_), int(cached)) for all_, cached in re.findall(r"(\d+) tokens, (\d+) of them", printed)]
        assert len(counts) == 3
        assert counts[0][1] == 0
        assert all(total - 10 < cached < total for total, cached in counts[1:])
        assert "3 caches are kept" in printed

    @pytest.fixture(scope="class")
    def serving(self):
        """The names of the example, and a port on which it serves."""
        names = runpy.run_path(str(ROOT / "examples" / "serve.py"))
        server = names["Server"](names["Service"](*load_model("embedded"), keep=2))
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield names, server
        server.shutdown()
        server.server_close()
        thread.join()

    def test_an_answer_is_that_of_generate(self, serving):
        names, server = serving
        batch = sample_recall_batch(1, 60, 2, generator=torch.Generator().manual_seed(5))
        texts = [decode_tokens(batch.context[0].tolist()), decode_tokens(batch.questions[0][1][:2].tolist())]
        model, tokenizer = load_model("embedded")
        ids = tokenizer(" ".join(texts), return_tensors="pt")["input_ids"]
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        found = [names["ask"](server.server_port, prompt=" ".join(texts), max_tokens=4) for _ in range(2)]
        assert {one["choices"][0]["text"] for one in found} == {
            tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
        }
        assert [one["usage"]["prompt_tokens_details"]["cached_tokens"] for one in found] == [0, ids.shape[1] - 1]
        assert found[0]["usage"]["prompt_tokens"] == ids.shape[1]

    def test_a_chat_has_the_special_tokens_of_its_template_alone(self, serving):
        names, _ = serving
        model, tokenizer = load_model("embedded")
        word = decode_tokens([20])
        tokenizer.add_special_tokens({"bos_token": decode_tokens([21])})
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{tokenizer.bos_token} $0",
            special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)],
        )
        tokenizer.chat_template = "{{ bos_token }} {{ messages[0]['content'] }}"
        service = names["Service"](model, tokenizer)
        assert service.complete(word, 1)["prompt_tokens"] == 2
        prompt = service.format_chat([{"role": "user", "content": word}])
        assert service.complete(prompt, 1, is_formatted=True)["prompt_tokens"] == 2

    @pytest.mark.parametrize(
        ("messages", "told"),
        [
            (None, "must be a list of objects"),
            ("hello", "must be a list of objects"),
            ([{"role": "user"}], "must be a list of objects"),
            ([{"role": "user", "content": "hello"}], "refuses these messages: no users here"),
        ],
    )
    def test_wrong_messages_are_refused(self, serving, messages, told):
        model, tokenizer = load_model("embedded")
        tokenizer.chat_template = "{{ raise_exception('no users here') }}"
        with pytest.raises(ValueError, match=told):
            serving[0]["Service"](model, tokenizer).format_chat(messages)

    def test_a_failure_is_answered_and_the_server_goes_on(self, serving, monkeypatch):
        names, server = serving
        monkeypatch.setattr(server, "handle_error", lambda *_arguments: None)  # prints the traceback
        monkeypatch.setattr(server.service, "complete", lambda *_arguments, **_options: {}["gone"])
        with pytest.raises(urllib.error.HTTPError) as caught:
            names["ask"](server.server_port, prompt="a")
        assert caught.value.code == 500
        assert json.load(caught.value)["error"]["message"] == "KeyError: 'gone'"
        monkeypatch.undo()
        assert names["ask"](server.server_port, prompt="a", max_tokens=2)["usage"]["total_tokens"] == 3

    def test_requests_at_once_get_their_own_answers(self, serving):
        names, server = serving
        batch = sample_recall_batch(1, 60, 2, generator=torch.Generator().manual_seed(5))
        texts = [[*batch.context[0].tolist(), *question[:2].tolist()] for question in batch.questions[0]]
        prompts = [decode_tokens(one) for one in texts]
        right = [decode_tokens(one.tolist()) for one in batch.answers[0]]
        assert right[0] != right[1]
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(names["ask"], server.server_port, prompt=one, max_tokens=4) for one in prompts * 2]
        assert [one.result()["choices"][0]["text"] for one in asked] == right * 2

    def test_a_wrong_configuration_ends_the_start(self, serving):
        with pytest.raises(ConfigError, match=r"missing\.yaml"):
            serving[0]["Service"](*load_model("embedded"), Path("missing.yaml"))

    @pytest.mark.parametrize(
        ("path", "body", "status", "told"),
        [
            ("/v1/completions", b"{", 400, "Expecting property name"),
            ("/v1/completions", b"[]", 400, "no JSON object"),
            ("/v1/completions", b"{}", 400, "'prompt' must be a text"),
            ("/v1/completions", b'{"prompt": "a", "max_tokens": 0}', 400, "from 1 to 4096"),
            ("/v1/completions", b'{"prompt": "a", "stream": true}', 400, "streaming is not supported"),
            ("/v1/chat/completions", b'{"messages": []}', 400, "no chat template"),
            ("/v1/completions", b'{"prompt": " "}', 400, "the prompt has no tokens"),
            ("/v1/completions", b'{"prompt": "a", "max_completion_tokens": 5000}', 400, "from 1 to 4096"),
            ("/v1/completions", b'{"prompt": "a", "max_tokens": 2048}', 400, "more than the 2048 of this model"),
            ("/v2/else", b"{}", 404, "there is no /v2/else"),
        ],
    )
    def test_wrong_requests_are_answered(self, serving, path, body, status, told):
        address = f"http://127.0.0.1:{serving[1].server_port}{path}"
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(address, data=body)
        assert caught.value.code == status
        assert told in json.load(caught.value)["error"]["message"]


class TestTransformersServe:
    @pytest.fixture(autouse=True)
    def own_loading(self, monkeypatch):
        """Give transformers its own way to load a model back after the test."""
        monkeypatch.setattr(ModelManager, "load_model_and_processor", ModelManager.load_model_and_processor)

    def test_the_second_question_spares_the_document(self, run_here):
        printed = run_here("transformers_serve.py")
        assert said("answer", printed) == said("right", printed)
        (first, none), (second, cached) = re.findall(r"(\d+) tokens, (\d+) of them cached", printed)
        assert (int(none), int(cached)) == (0, int(second) - 1)
        assert first == second

    @pytest.mark.parametrize("option", ["--continuous-batching", "--compile"])
    def test_what_keeps_full_precision_is_refused(self, run_here, capsys, option):
        with pytest.raises(SystemExit):
            run_here("transformers_serve.py", "model", option)
        assert f"{option} keeps" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "given",
        [
            {"pixel_values": torch.zeros(1)},
            {"generation_config": GenerationConfig(num_beams=2)},
            {"generation_config": GenerationConfig(cache_implementation="static")},
        ],
    )
    def test_what_tokens_do_not_tell_is_not_reused(self, given):
        is_plain = runpy.run_path(str(ROOT / "examples" / "transformers_serve.py"))["is_plain"]
        plain = {name: torch.ones(1, 9) for name in ("input_ids", "attention_mask")}
        assert is_plain({"generation_config": GenerationConfig(), "tokenizer": object(), **plain})
        assert not is_plain({"generation_config": GenerationConfig(), **plain, **given})

    @pytest.mark.slow
    def test_requests_to_transformers_own_server(self, capsys):
        for package in ("fastapi", "uvicorn", "openai"):
            pytest.importorskip(package, reason="pip install 'transformers[serving]'")
        runpy.run_path(str(ROOT / "examples" / "transformers_serve.py"))["quantize_all_models"](None, 2)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        path = find_model_path("embedded")
        server = Serve(path, device="cpu", host="127.0.0.1", port=port, non_blocking=True)
        try:
            batch = sample_recall_batch(1, 60, 1, generator=torch.Generator().manual_seed(5))
            texts = [decode_tokens(batch.context[0].tolist()), decode_tokens(batch.questions[0][0][:2].tolist())]
            found = [ask_transformers(port, {"prompt": " ".join(texts), "max_tokens": 4}) for _ in range(2)]
            (loaded,) = server._model_manager.loaded_models.values()
            readers = [layer.kernel_cache.last_reader for layer in loaded.model.generate.attachment.cache.layers]
        finally:
            server.kill_server()
        right = decode_tokens(batch.answers[0][0].tolist())
        assert [one["choices"][0]["text"] for one in found] == [right, right]
        total = found[0]["usage"]["prompt_tokens"]
        assert re.findall(r"tokens, (\d+) of them", capsys.readouterr().out) == ["0", str(total - 1)]
        assert [one for one in readers if not one or one.startswith("materialized")] == []


def ask_transformers(port, body):
    """Post to `/v1/completions` of transformers' server, as soon as it listens, and return the answer."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    for _ in range(200):
        try:
            with urllib.request.urlopen(request) as reply:  # noqa: S310  # an address of this machine
                return json.load(reply)
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionRefusedError):
                raise
            time.sleep(0.1)
    raise TimeoutError("the server does not listen")
