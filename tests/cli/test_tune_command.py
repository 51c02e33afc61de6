"""`kvq tune`, `kvq sweep` and `kvq import-kvtuner` as a user meets them."""

from __future__ import annotations

import json

import pytest

from kvq import KVQCacheConfig
from kvq.cli.tune_text import TextOptions, load_texts
from kvq.evaluation.embedded_model import load_embedded_model

SMALL = ("--model", "embedded", "--length", "300", "--bits", "2,4", "--context", "1000")
QUICK = (*SMALL, "--sequences", "1", "--held-out-sequences", "1", "--tries", "0")


@pytest.fixture
def call_tune(call_kvq, tmp_path):
    """Return a function that runs `kvq tune` beside some files in this process."""
    (tmp_path / "layers.yaml").write_text("{backend: native, layers: {0: {nbits_k: 8}}}")
    (tmp_path / "short.txt").write_text("a few words")
    (tmp_path / "folder").mkdir()
    return lambda *args: call_kvq("tune", *args)


def test_a_run_is_a_configuration_a_record_a_front_and_a_picture(call_tune, call_kvq, tmp_path):
    pytest.importorskip("matplotlib")
    outputs = ("--out", "own.yaml", "--record", "own.json", "--front", "front", "--picture", "own.svg")
    done = call_tune(*QUICK, "--budget", "5.5", *outputs)
    assert done.returncode == 0
    assert "warning: only" in done.stderr
    assert "embedded: at most 5.5 bits an element at 1,000 tokens" in done.stdout
    assert "verified on recall-report (1 x 300 tokens): KL" in done.stdout
    config = KVQCacheConfig.from_file(tmp_path / "own.yaml")
    record = json.loads((tmp_path / "own.json").read_text())
    assert record["tuning"]["tuned"]["config"] == config.to_dict()
    assert record["tuning"]["tuned"]["bits"] <= 5.5
    assert record["text"] == "recall-report"
    assert record["tuning"]["calibration"] == "recall-calibration"
    labels = [one["label"] for one in record["records"]]
    assert (labels[0], len(labels)) == ("tuned", 3)
    assert all(label.startswith("uniform K") for label in labels[1:])
    assert record["tuning"]["command"].startswith("kvq ")
    front = sorted((tmp_path / "front").glob("*.yaml"))
    assert len(front) == len(record["tuning"]["front"]) > 2
    assert KVQCacheConfig.from_file(front[0]).to_dict() == record["tuning"]["front"][0]["config"]
    assert "<svg" in (tmp_path / "own.svg").read_text()
    assert not (tmp_path / "own.yaml.parts").exists()
    again = call_tune(*QUICK, "--budget", "5.5", "--parts", "kept", "--out", "again.yaml")
    assert again.returncode == 0
    assert len(list((tmp_path / "kept").glob("probe-*.pt"))) >= 3 * 2 * 2
    assert KVQCacheConfig.from_file(tmp_path / "again.yaml") == config
    planned = call_kvq("plan", "--model", "embedded", "--context", "1000", "--config", "own.yaml", "--json")
    assert json.loads(planned.stdout)["total_bytes"] == record["tuning"]["tuned"]["bytes"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "give one goal: --budget BITS, --memory SIZE or --max-kl NATS"),
        (("--budget", "4", "--memory", "1GiB"), "give one goal"),
        (("--budget", "-1"), "a goal is a finite number above 0, got -1"),
        (("--budget", "nan"), "a goal is a finite number above 0"),
        (("--memory", "much"), "--memory: 'much' is not a size in bytes"),
        (("--budget", "1"), "--budget 1 is below the smallest candidate"),
        (("--memory", "9KiB"), "--memory 9.0 KiB is below the smallest candidate"),
        (("--budget", "5", "--bits", "x"), "--bits 'x' is not accepted"),
        (("--budget", "5", "--bits", "9"), "backend 'native' has none of the candidates"),
        (("--budget", "5", "--backend", "nobody"), "backend 'nobody' is unknown"),
        (("--budget", "5", "--axis", "sideways"), "--axis 'sideways' is not accepted"),
        (("--budget", "5", "--clip", "1.5"), "--clip '1.5' is not accepted; write auto, none, or a part of the range"),
        (("--budget", "5", "--clip", "some"), "--clip 'some' is not accepted"),
        (("--budget", "5", "--metadata", "int4"), "--metadata 'int4' is not accepted; choose from default, float16"),
        (("--budget", "5", "--keep-first", "2", "--keep-last", "1"), "leave none of the 3 layers to quantize"),
        (("--budget", "5", "--text", "nowhere.txt"), "--text 'nowhere.txt' does not exist"),
        (("--budget", "5", "--held-out-text", "folder"), "--held-out-text 'folder' is a directory"),
        (("--budget", "5", "--text", "short.txt", "--dataset", "recall-report"), "give one text"),
        (("--budget", "5", "--dataset", "topics-report"), "the embedded model knows the words of its own task only"),
        (("--budget", "5", "--prefill", "299"), "--prefill 299 leaves nothing of --length 300 to score"),
        (("--budget", "5", "--length", "999999"), "is more than the"),
        (("--budget", "5", "--out", "own.json"), "--out 'own.json' is not a YAML file"),
        (("--budget", "5", "--out", "nowhere/own.yaml"), "'nowhere/own.yaml' cannot be written"),
        (("--budget", "5", "--front", "nowhere/front"), "--front 'nowhere/front' cannot be written"),
        (("--budget", "5", "--parts", "nowhere/parts"), "--parts 'nowhere/parts' cannot be written"),
        (("--budget", "5", "--picture", "own.txt"), "'own.txt' is not a picture file"),
        (("--budget", "5", "--config", "layers.yaml"), "has settings of single layers, which tuning chooses"),
        (("--budget", "5", "--model", "nowhere"), "model 'nowhere' cannot be loaded"),
        (("--budget", "5", "--device", "moon"), "device 'moon' is unknown"),
    ],
)
def test_a_wrong_use_is_one_line_and_exit_code_2(call_tune, args, said):
    done = call_tune(*QUICK, *args)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert said in line


@pytest.mark.slow
@pytest.mark.costly
def test_two_processes_choose_what_one_does(run, call_tune, tmp_path):
    args = (*SMALL, "--sequences", "1", "--held-out-sequences", "2", "--batch-size", "1", "--budget", "5.5")
    args = (*args, "--tries", "7", "--device", "cpu")
    assert call_tune(*args, "--out", "one.yaml", "--record", "one.json").returncode == 0
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1")
    options = ("--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1")
    outputs = ("--out", "two.yaml", "--record", "two.json", "--parts", "kept")
    done = run(*launcher, *options, "--module", "kvq", "tune", *args, *outputs, HF_HUB_OFFLINE=1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("KL of keys alone") == 1  # one table, of both
    assert done.stderr.count("warning: only") == 1
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one["records"] == two["records"]
    for name in ("tuned", "front", "uniforms", "sensitivities", "before_exchanges"):
        assert one["tuning"][name] == two["tuning"][name]
    config = KVQCacheConfig.from_file(tmp_path / "two.yaml")
    assert config == KVQCacheConfig.from_file(tmp_path / "one.yaml")


def test_a_text_without_a_report_part_is_divided(tmp_path):
    _, tokenizer = load_embedded_model()
    model = load_embedded_model()[0]
    own = TextOptions(None, "recall-report", None, None, 2, 3, 300)
    first, rest = load_texts(own, model, tokenizer)
    assert (len(first.sequences), len(rest.sequences)) == (2, 3)
    assert not any((one == other).all() for one in first.sequences for other in rest.sequences)
    both = load_texts(TextOptions(None, "recall-calibration", None, "recall-report", 2, 3, 300), model, tokenizer)
    assert [one.name for one in both] == ["recall-calibration", "recall-report"]


def test_a_sweep_is_a_table_a_file_and_a_picture(call_kvq, tmp_path):
    pytest.importorskip("matplotlib")
    grid = ("--backend", "native", "--backend", "quanto", "--bits-k", "4,3", "--bits-v", "2", "--no-peers")
    text = ("--model", "embedded", "--dataset", "recall-report", "--sequences", "1", "--length", "300")
    done = call_kvq("sweep", *text, *grid, "--out", "all.json", "--picture", "all.png")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads((tmp_path / "all.json").read_text())
    assert [one["label"] for one in found["records"]] == ["native K4V2", "native K3V2", "quanto K4V2"]
    assert "left out: quanto has no 3 bits" in done.stdout
    sizes = {one["label"]: (one["held_bytes"], one["kl"]["mean"]) for one in found["records"]}
    for label in found["sweep"]["front"]:
        assert not any(one < sizes[label] and one[1] < sizes[label][1] for one in sizes.values())
    assert found["sweep"]["left_out"] == ["quanto has no 3 bits"]
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "all.json.parts").exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "give the text: either --text FILE or --dataset ID"),
        (("--dataset", "recall-report", "--bits-k", "many"), "--bits-k 'many' is not accepted"),
        (("--dataset", "recall-report", "--bits-v", "3.5"), "the grid has no configuration"),
        (("--dataset", "recall-report", "--backend", "nobody"), "backend 'nobody' is unknown"),
        (("--dataset", "recall-report", "--config", "nowhere.yaml"), "'nowhere.yaml' does not exist"),
        (("--dataset", "recall-report", "--out", "nowhere/all.json"), "cannot be written"),
    ],
)
def test_a_wrong_sweep_is_one_line_and_exit_code_2(call_kvq, args, said):
    done = call_kvq("sweep", "--model", "embedded", *args)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert said in line


def test_an_allocation_of_kvtuner_becomes_a_configuration(call_kvq, tmp_path):
    (tmp_path / "preset.yaml").write_text("0: {nbits_key: 8, nbits_value: 4}\n1: {nbits_key: 4, nbits_value: 2}\n")
    assert call_kvq("import-kvtuner", "preset.yaml", "--scheme", "kivi", "--out", "own.yaml").returncode == 0
    config = KVQCacheConfig.from_file(tmp_path / "own.yaml")
    assert [config.for_layer(index).key.nbits for index in (0, 1)] == [8, 4]
    assert config.for_layer(1).value.granularity == "per_token"
    printed = call_kvq("import-kvtuner", "preset.yaml")
    assert printed.stdout.startswith("# The bits of preset.yaml, an allocation of KVTuner")
    wrong = call_kvq("import-kvtuner", "preset.yaml", "--scheme", "other")
    assert (wrong.returncode, len(wrong.stderr.splitlines())) == (2, 1)
