"""The table of speed targets in docs/speed.md, and the runs on GPUs."""

import json
from dataclasses import asdict

import gpu_tables
from target_table import LEFT_OUT, class_target_rows, target_rows, wide_target_rows

from kvq.attention.kernels.triton.plan import LIGHT_WAY


def measured(label, step_ms=None, **facts):
    step = None if step_ms is None else {"median": step_ms}
    return {"label": label, "failure": None, "step_ms": step, "transient_bytes": 2**19, **facts}


def setting_facts(length, *contenders, batch=1, dtype="bfloat16", **facts):
    return {"length": length, "batch": batch, "dtype": dtype, "contenders": list(contenders), **facts}


def test_targets_are_filled_from_the_runs():
    fused, buffer = measured("kvq native 4, fused", 2.0), measured("buffer, packed queries", 5.0)
    peer, eager = measured("transformers quanto 4", 50.0), measured("kvq hqq 4, eager", 10.0)
    short = measured("kvq quanto 4, fused", 1.0, to_dynamic={"median": 0.7})
    draft = measured("kvq native 4, fused", to_dynamic={"median": 0.9})
    steps = measured("kvq native 4, fused", p99_to_median=1.6)
    runs = [
        {
            "layer": [setting_facts(32768, fused, buffer, peer, eager), setting_facts(2048, fused, buffer)],
            "model": [setting_facts(8192, fused, measured("DynamicCache, packed queries", 3.0))],
            "forwards": [setting_facts(32768, draft, rejected=3)],
            "steps": [setting_facts(2048, steps)],
        },
        {"model": [setting_facts(256, short, batch=8)], "layer": []},
    ]
    way = {**asdict(LIGHT_WAY), "batch": 1, "length": 32768}
    ways = [{**way, "kernel_us": 50, "baseline_us": 100}, {**way, "kernel_us": 80, "baseline_us": 60}]
    gpu_runs = [{"device": "Some GPU, 100 processors", "ways": [*ways, {**ways[0], "warps": 4, "kernel_us": 1}]}]
    reached = [row[-1] for row in target_rows(runs, gpu_runs)]
    assert reached == [
        "bf16 2.5x at 32,768",
        "bf16 25x at 32,768",
        "bf16 5x at 32,768",
        "bf16 0.50 MiB",
        "bf16 1.5x at 8,192",
        "native 1.60 to 1.60",
        "quanto 0.70x to 0.70x",
        LEFT_OUT,
        "native 0.90x at 32,768",
        "0.75x to 2.00x (Some GPU)",
    ]
    assert {row[-1] for row in target_rows([])} == {LEFT_OUT}


def test_targets_of_a_class_are_shares_of_full_precision():
    fused = measured("kvq native 4, fused", 2.0, flush_ms={"median": 3.0}, to_buffer={"median": 0.45})
    whole = measured("kvq native 4, fused", 5.0, to_dynamic={"median": 0.8})
    runs = [
        {
            "options": {"model": None},
            "layer": [setting_facts(8192, fused), setting_facts(2048, fused)],
            "steps": [setting_facts(2048, measured("kvq hqq 4, fused", p99_to_median=2.17), dtype="float32")],
        },
        {
            "options": {"model": "smollm2"},
            "layer": [setting_facts(4096, fused)],
            "model": [setting_facts(4096, whole)],
            "steps": [setting_facts(256, measured("kvq hqq 4, fused", p99_to_median=1.2), dtype="float32")],
        },
    ]
    prompt = measured("kvq native 4, fused", first_to_dynamic={"median": 1.03})
    runs[1]["first_token"] = [setting_facts(2048, prompt, dtype="float32")]
    first_call = {"median_ms": {"first step": 31.6}}
    assert [row[-1] for row in class_target_rows(runs, first_call)] == [
        "0.45 (bf16 at 8,192)",
        "0.80 (bf16 at 4,096)",
        "2.17, 1.20 (SmolLM2)",
        "1.50 (bf16)",
        "1.03 (SmolLM2, fp32, 2,048)",
        "32 ms",
    ]
    assert {row[-1] for row in class_target_rows([], first_call)} == {LEFT_OUT, "32 ms"}
    assert {row[-1] for row in class_target_rows([])} == {LEFT_OUT}


def test_two_bits_are_held_against_four_of_the_same_setting():
    two, four = measured("kvq 2bit, fused", 1.5), measured("kvq 4bit, fused", 2.0)
    long = measured("kvq native 4, fused", 2.0, to_buffer={"median": 0.12})
    runs = [{"options": {"model": None}, "layer": [setting_facts(32768, two, four), setting_facts(32768, long)]}]
    assert [row[-1] for row in wide_target_rows(runs)] == ["0.12 (bf16 at 32,768)", "0.75 (bf16)"]
    assert {row[-1] for row in wide_target_rows([])} == {LEFT_OUT}


def test_every_run_on_a_gpu_links_its_own_file(tmp_path, monkeypatch):
    run = json.loads((gpu_tables.RESULTS / "triton-h200.json").read_text())
    for device in ("one", "other"):
        (tmp_path / f"triton-{device}.json").write_text(json.dumps({**run, "device": device}))
    monkeypatch.setattr(gpu_tables, "RESULTS", tmp_path)
    told = [part for part in gpu_tables.render_gpu_runs() if "measurements](" in part]
    assert [text.split(",")[0] for text in told] == ["one", "other"]
    assert [text.split("](")[-1] for text in told] == [
        "../benchmarks/results/triton-one.json).",
        "../benchmarks/results/triton-other.json).",
    ]
