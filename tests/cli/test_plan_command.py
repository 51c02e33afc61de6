"""`kvq plan`: from a folder with a configuration and nothing else."""

from __future__ import annotations

import json

import pytest
from transformers import LlamaConfig, MambaConfig, T5Config

SIZES = dict(hidden_size=64, intermediate_size=96, num_attention_heads=2, num_key_value_heads=1, vocab_size=99)
CONFIG = "layers: {'last:1': {full_precision: true}}\n"


@pytest.fixture
def folder(tmp_path):
    LlamaConfig(num_hidden_layers=3, dtype="bfloat16", max_position_embeddings=4096, **SIZES).save_pretrained(
        tmp_path / "llama"
    )
    T5Config().save_pretrained(tmp_path / "t5")
    MambaConfig(hidden_size=64, num_hidden_layers=2).save_pretrained(tmp_path / "mamba")
    (tmp_path / "empty").mkdir()
    for name, text in {"broken": "{", "strange": '{"model_type": "nothing"}'}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    (tmp_path / "good.yaml").write_text(CONFIG)
    (tmp_path / "faulty.yaml").write_text("nbits_k: 5\nresidual_length: -1\n")
    (tmp_path / "tight.yaml").write_text("{axis_key: per_token, axis_value: per_token, q_group_size: 2, nbits_k: 8}")
    return tmp_path


@pytest.fixture
def plan(call_kvq, folder):
    """Return a function that runs `kvq plan`."""
    return lambda *args: call_kvq("plan", *args)


def test_a_plan_is_a_table_and_sentences(plan):
    asked = ("--model", "llama", "--config", "good.yaml", "--context", "2000", "--gpu-memory", "1MiB")
    done = plan(*asked)
    assert (done.returncode, done.stderr) == (0, "")
    first, *rest = done.stdout.splitlines()
    assert first.startswith("LlamaForCausalLM, 2,000 tokens: ")
    assert any(line.startswith("0-1     quanto 4 bit per_channel by 64") and "default" in line for line in rest)
    assert any(line.startswith("2  ") and "layers['last:1']: full_precision" in line for line in rest)
    assert any(line.startswith("1.0 MiB: 2,000 tokens fit; the most that fit are ") for line in rest)
    assert rest[-1].startswith("left out: activations")


def test_json_has_what_the_help_says(plan):
    done = plan("--model", "llama", "--context", "2000", "--batch", "3", "--json", "--weights-memory", "1MB")
    made = json.loads(done.stdout)
    assert (made["context"], made["batch"], made["dtype"], made["fits"]) == (2000, 3, "bfloat16", None)
    assert made["weights_bytes"] == 1_000_000
    assert made["full_precision_bytes"] == 3 * 3 * 2000 * 2 * 32 * 2
    assert made["layers"][2]["value"]["effective_bits"] < 4
    told = set(plan("--help").stdout.replace("\n", " ").split('"')[1::2])
    assert set(made) | set(made["layers"][0]) | set(made["layers"][0]["key"]) <= told | {
        "total_bytes",
        "full_precision_bytes",
        "later_bytes",
        "later_full_precision_bytes",
        "peak_bytes",
    }


def test_the_embedded_model_needs_no_folder(plan):
    done = plan("--model", "embedded", "--context", "961", "--dtype", "float16")
    assert done.returncode == 0
    assert "655,488 parameters, 1.3 MiB in float16" in done.stdout


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--model", "no/such"], 2, "'no/such' is not a folder, and the hub gave no configuration of that name"),
        (["--model", "../no/such/place"], 2, "Repo id must be in the form"),
        (["--model", "empty"], 2, "'empty' has no config.json"),
        (["--model", "broken"], 2, "'broken': the configuration cannot be used"),
        (["--model", "strange"], 2, "has model type `nothing`"),
        (["--model", "t5"], 1, "T5Config describes an encoder-decoder model"),
        (["--model", "mamba"], 1, "nothing in this model would be quantized"),
        (["--model", "llama", "--config", "tight.yaml"], 1, "q_group_size: 2 gives"),
        (["--model", "llama", "--config", "none.yaml"], 2, "none.yaml"),
        (["--model", "llama", "--config", "faulty.yaml"], 2, "faulty.yaml has 2 faults"),
        (["--model", "llama", "--gpu-memory", "24G"], 2, "'24G' is not a size in bytes"),
        (["--model", "llama", "--weights-memory", "much"], 2, "'much' is not a size in bytes"),
        (["--model", "llama", "--dtype", "int8"], 2, "--dtype 'int8' is not accepted"),
        (["--model", "llama", "--context", "0"], 2, "--context"),
        (["--model", "llama", "--batch", "0"], 2, "--batch"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_what_is_wrong_is_told_in_one_line(call_kvq, args, code, message):
    done = call_kvq("plan", "--context", "100", *args)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    if "faults" not in message and not message.startswith("--"):
        assert done.stderr.count("\n") == 1
