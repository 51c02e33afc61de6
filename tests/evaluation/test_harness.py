"""The model type of lm-evaluation-harness, offline: its API and its command line on tasks of the embedded model.

Skipped where lm-evaluation-harness is not installed; `make eval-harness` installs it in an environment of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml

from kvq.errors import ConfigError, ModelError
from kvq.evaluation.embedded_model import EMBEDDED_MODEL_PATH, load_embedded_model
from kvq.evaluation.recall import VOCABULARY, decode_tokens, sample_recall_batch

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402 - after the check that it is there
from lm_eval.tasks import TaskManager  # noqa: E402

from kvq.evaluation.harness import KVQHarnessModel  # noqa: E402

pytestmark = pytest.mark.slow

CONTEXTS, QUESTIONS = 12, 4
TASKS = ("recall_generate", "recall_likely", "recall_choice")
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
BITS = {"k4v2": {"nbits_k": 4, "nbits_v": 2}, "k2v2": {"nbits_k": 2, "nbits_v": 2}}
EXACT = {"residual_length": 4096}

COMMON = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{prompt}}"}
GENERATE = {
    "output_type": "generate_until",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": [" ."], "max_gen_toks": 6, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
LIKELY = {
    "output_type": "loglikelihood",
    "doc_to_target": " {{answer}}",
    "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}],
}
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_choice": "choices",
    "doc_to_target": "right",
    "metric_list": [{"metric": "acc"}],
}


def draw_documents():
    """Questions about records; the wrong choices end in the last word of another record."""
    batch = sample_recall_batch(CONTEXTS, 160, QUESTIONS, generator=torch.Generator().manual_seed(1))
    for context, questions in zip(batch.context.tolist(), batch.questions.tolist(), strict=True):
        for question in questions:
            *first, last = (VOCABULARY[token] for token in question[2:6])
            wrong = [VOCABULARY[other[5]] for other in questions if other is not question]
            yield {
                "prompt": decode_tokens(context + question[:2]),
                "answer": " ".join([*first, last]),
                "choices": [" ".join([*first, word]) for word in [*wrong, last]],
                "right": len(wrong),
            }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tasks, their documents, configurations, and the tokenizer with the end-of-text token that `hf` wants."""
    path = tmp_path_factory.mktemp("harness")
    documents = path / "recall.jsonl"
    documents.write_text("".join(json.dumps(document) + "\n" for document in draw_documents()))
    data = {"dataset_kwargs": {"data_files": {"test": str(documents)}, "cache_dir": str(path / "cache")}}
    for name, task in zip(TASKS, (GENERATE, LIKELY, CHOICE), strict=True):
        (path / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **COMMON, **data, **task}))
    for name, bits in BITS.items():
        (path / f"{name}.yml").write_text(yaml.safe_dump(bits))
    tokenizer = load_embedded_model()[1]
    tokenizer.eos_token = tokenizer.pad_token
    tokenizer.save_pretrained(path / "tokenizer")
    return path


@pytest.fixture(scope="module", autouse=True)
def offline():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in OFFLINE.items():
            patch.setenv(name, value)
        yield


def model_args(folder: Path, **more):
    return {"pretrained": str(EMBEDDED_MODEL_PATH), "tokenizer": str(folder / "tokenizer"), "device": "cpu", **more}


def evaluate(folder: Path, model, tasks=TASKS, **options):
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    options = {"batch_size": 8, "bootstrap_iters": 0, **options}
    found = lm_eval.simple_evaluate(model=model, tasks=list(tasks), task_manager=manager, **options)
    scores = {name: {key.split(",")[0]: value for key, value in row.items()} for name, row in found["results"].items()}
    return scores, found


@pytest.fixture(scope="module")
def full_precision(folder):
    return evaluate(folder, "hf", model_args=model_args(folder, dtype="float32"))


@pytest.fixture(scope="module")
def quantized(folder):
    """Scores by name of the configuration, through the path of a file."""
    return {
        name: evaluate(
            folder, "kvq", model_args=model_args(folder, dtype="float32", kvq_config=str(folder / f"{name}.yml"))
        )
        for name in BITS
    }


def likelihoods(found, task):
    return [response for sample in found["samples"][task] for response in sample["filtered_resps"]]


@pytest.mark.parametrize("batch_size", [8, "auto"])
def test_where_all_is_exact_it_answers_as_hf(folder, full_precision, batch_size):
    arguments = model_args(folder, dtype="float32", kvq_config=EXACT, max_batch_size=8)
    scores, found = evaluate(folder, "kvq", model_args=arguments, batch_size=batch_size)
    for task in ("recall_likely", "recall_choice"):
        expected = likelihoods(full_precision[1], task)
        for ours, theirs in zip(likelihoods(found, task), expected, strict=True):
            assert ours[0] == pytest.approx(theirs[0], abs=1e-4)
            assert ours[1] == theirs[1]
    assert scores["recall_generate"]["exact_match"] == full_precision[0]["recall_generate"]["exact_match"]


def test_full_precision_knows_the_answers_four_bits_too_and_two_bits_lose_some(full_precision, quantized):
    hf, k4v2, k2v2 = full_precision[0], quantized["k4v2"][0], quantized["k2v2"][0]
    for task, metric in (("recall_generate", "exact_match"), ("recall_likely", "acc")):
        assert hf[task][metric] > 0.95
        assert k4v2[task][metric] > hf[task][metric] - 0.05
        assert k2v2[task][metric] < hf[task][metric] - 0.15
    assert k2v2["recall_likely"]["perplexity"] > 1.2 * hf["recall_likely"]["perplexity"]


def test_choices_are_scored_from_the_quantized_cache(full_precision, quantized):
    expected = likelihoods(full_precision[1], "recall_choice")
    shift = {
        name: max(
            abs(ours[0] - theirs[0]) for ours, theirs in zip(likelihoods(found, "recall_choice"), expected, strict=True)
        )
        for name, (_, found) in quantized.items()
    }
    assert 1e-3 < shift["k4v2"] < shift["k2v2"]


def test_the_results_say_what_was_measured(quantized):
    config = quantized["k2v2"][1]["config"]
    assert (config["kvq_config"]["nbits_k"], config["kvq_config"]["nbits_v"], config["kvq_step"]) == (2, 2, 1)
    json.dumps(config["kvq_config"])


def test_a_model_object_serves_as_well_and_is_given_back(folder):
    model, tokenizer = load_embedded_model(torch.float32)
    tokenizer.eos_token = tokenizer.pad_token
    ours = KVQHarnessModel(pretrained=model, tokenizer=tokenizer, kvq_config=BITS["k2v2"], batch_size=8)
    scores, _ = evaluate(folder, ours, tasks=["recall_generate"], limit=8)
    assert ours.attachment.cache.memory().compression > 2
    assert 0 <= scores["recall_generate"]["exact_match"] <= 1
    ours.attachment.detach()
    assert "_prepare_cache_for_generation" not in vars(model)


@pytest.mark.parametrize("step", [1, 16])
def test_rolling_windows_of_a_text_longer_than_the_model_takes(folder, step):
    prompt = next(draw_documents())["prompt"]
    sums = {}
    for name, options in {"hf": {}, "kvq": {"kvq_config": EXACT, "kvq_step": step}}.items():
        arguments = model_args(folder, dtype="float32", max_length=400, batch_size=3, **options)
        model = lm_eval.api.registry.get_model(name)(**arguments)
        request = Instance("loglikelihood_rolling", {}, (prompt,), 0)
        (sums[name],) = model.loglikelihood_rolling([request], disable_tqdm=True)
    assert sums["kvq"] == pytest.approx(sums["hf"], abs=1e-4 * 961)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kvq_config": "no/such/file.yaml"}, "no/such/file.yaml"),
        ({"kvq_config": {"nbits_q": 4}}, "nbits_q"),
        ({"kvq_step": 0}, "kvq_step"),
        ({"kvq_step": "1"}, "kvq_step"),
        ({"kvq_confg": "k4v2.yaml"}, "kvq_confg"),
    ],
)
def test_what_is_wrong_is_refused_before_a_model_is_loaded(options, message):
    with pytest.raises(ConfigError, match=message):
        KVQHarnessModel(pretrained="no/such/model", **options)


def test_an_encoder_decoder_model_is_refused(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    small = T5Config(vocab_size=491, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    T5ForConditionalGeneration(small).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="causal"):
        KVQHarnessModel(pretrained=str(tmp_path), tokenizer=load_embedded_model()[1], device="cpu")


def run_command_line(module: str, folder: Path, config: str, *more: str) -> subprocess.CompletedProcess[str]:
    arguments = f"pretrained={EMBEDDED_MODEL_PATH},tokenizer={folder / 'tokenizer'},kvq_config={config}"
    task = ["--tasks", "recall_generate", "--include_path", str(folder), "--limit", "8", "--batch_size", "8"]
    command = [
        sys.executable,
        "-m",
        module,
        "--model",
        "kvq",
        "--model_args",
        arguments,
        "--device",
        "cpu",
        *task,
        *more,
    ]
    environment = {**os.environ, **OFFLINE}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, cwd=folder, env=environment
    )


def test_its_command_line_with_the_model_type_registered(folder):
    done = run_command_line("kvq.evaluation.harness", folder, "k2v2.yml", "--output_path", "out")
    assert done.returncode == 0, done.stderr
    assert "recall_generate" in done.stdout
    (results,) = (folder / "out").rglob("results_*.json")
    saved = json.loads(results.read_text())
    assert saved["config"]["kvq_config"]["nbits_k"] == 2
    assert 0 < saved["results"]["recall_generate"]["exact_match,none"] < 1


def test_an_error_of_ours_ends_the_command_line_with_one_line(folder):
    done = run_command_line("kvq.evaluation.harness", folder, "absent.yaml")
    assert done.returncode == 1
    assert "absent.yaml" in done.stderr.splitlines()[-1]


def test_the_entry_point_names_the_model_type():
    (found,) = (point for point in metadata.distribution("kvq").entry_points if point.group == "lm_eval.models")
    assert (found.name, found.load()) == ("kvq", KVQHarnessModel)


@pytest.mark.skipif(
    not hasattr(lm_eval.api.registry, "import_plugins"), reason="this release of lm-eval reads no entry points"
)
def test_its_own_command_line_finds_the_model_type_by_entry_point(folder):
    done = run_command_line("lm_eval", folder, "k2v2.yml")
    assert done.returncode == 0, done.stderr
