"""The Triton programs compile for GPUs without one, and their registers suffice: `ptxas` says how many spill."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from codebook_groups import spec_of as codebook_of
from gpu_compilation import Loop, assemble, compile_for, compile_parts, find_loops, measure_loop, plan_launch
from interpreted_triton import DEFAULTS, PLAIN
from optional_triton import needs_triton

from kvq import KVQ
from kvq.attention.dispatch.request import AttentionRequest
from kvq.attention.kernels.triton import plan
from kvq.attention.kernels.triton.fixed_launch import FixedLaunch, FixedPlan
from kvq.attention.kernels.triton.kernel import TRITON
from kvq.attention.proving.trial import CHECKS, TIMED

pytestmark = needs_triton
LEVELS = {"backend": codebook_of(), "nbits_v": 4, "q_group_size": {"key": 64, "value": 128}}


def make_launch(dtype, head_dim, **fields):
    cache = KVQ({"backend": "native", **PLAIN, **fields})
    states = torch.randn(1, 1, 700, head_dim, dtype=dtype)
    cache.update(states, states, 0)
    pair = cache.layers[0].update(states[:, :, :1], states[:, :, :1], packed=True)[0].pair
    request = AttentionRequest(torch.randn(1, 4, 1, head_dim, dtype=dtype), pair, None, scaling=1.0)
    assert TRITON.why_unsupported(request) is None
    return plan_launch(request)


@pytest.mark.parametrize(
    ("architecture", "head_dim", "dtype", "fields", "most_spilled"),
    [
        # By Triton 3.7 and 3.9: 304 and 448.
        (90, 128, torch.bfloat16, {"nbits_v": 4}, 512),
        (80, 128, torch.bfloat16, {"nbits_v": 4, "q_group_size": {"key": 64, "value": 128}}, 400),
        pytest.param(80, 128, torch.bfloat16, {"nbits_v": 4}, 400, marks=pytest.mark.slow),
        pytest.param(90, 128, torch.bfloat16, DEFAULTS, 512, marks=pytest.mark.slow),
        pytest.param(90, 128, torch.bfloat16, {**DEFAULTS, "metadata_dtype": "int8"}, 400, marks=pytest.mark.slow),
        pytest.param(80, 256, torch.bfloat16, DEFAULTS, 512, marks=pytest.mark.slow),
        # By Triton 3.7: 0 and 768.
        pytest.param(90, 128, torch.bfloat16, {**LEVELS, "axis_key": "per_token"}, 64, marks=pytest.mark.slow),
        pytest.param(90, 128, torch.bfloat16, LEVELS, 900, marks=pytest.mark.costly),
        pytest.param(90, 128, torch.float16, {"nbits_k": 7, "nbits_v": 7}, 512, marks=pytest.mark.slow),
        # Two warps, which no warp group can be made of; with 4 nothing would spill.
        pytest.param(90, 128, torch.float32, {}, 1100, marks=pytest.mark.slow),
        pytest.param(90, 80, torch.bfloat16, {"axis_key": "per_token"}, 512, marks=pytest.mark.slow),
        pytest.param(90, 256, torch.bfloat16, {}, 512, marks=pytest.mark.slow),
        pytest.param(80, 256, torch.bfloat16, {}, 512, marks=pytest.mark.slow),
    ],
)
def test_a_program_keeps_to_its_registers_and_reads_in_wide_loads(
    architecture, head_dim, dtype, fields, most_spilled, tmp_path
):
    compiled = compile_parts(make_launch(dtype, head_dim, **fields), architecture)
    assembled = assemble(compiled, architecture, tmp_path)
    assert assembled.spilled_bytes <= most_spilled
    assert 32 <= assembled.registers <= 255
    text = compiled.asm["ptx"]
    assert "mma" in text, "products run on tensor cores"
    # Codes come 16 bytes at a time; the single bytes are exponents, one for each side and kind of metadata, or these.
    assert len(re.findall(r"ld\.global(?:\.\w+)*\.v\d|cp\.async", text)) >= 2
    assert len(re.findall(r"ld\.global(?:\.\w+)*\.[bu]8\b", text)) <= (10 if "metadata_dtype" in fields else 8)


MANY_ROWS = {
    "16 rows": replace(TIMED, sharing=16),
    "40 rows": replace(TIMED, sharing=8, queries=5),
    "64 rows, float16": replace(TIMED, sharing=64, dtypes=(torch.float16,) * 3),
    "16 rows, float32": replace(TIMED, sharing=16, dtypes=(torch.float32,) * 3),
    "16 rows, long blocks": replace(TIMED, sharing=16, group_size=128),
    "16 rows, head dim 256": replace(TIMED, sharing=16, head_dim=256),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "40 rows" else pytest.mark.costly) for name in MANY_ROWS]
)
def test_no_product_is_of_a_whole_warp_group(name):
    """Triton lets some of these read outside of their memory, on Hopper GPUs."""
    launch = plan_launch(MANY_ROWS[name].build(torch.device("cpu")))
    text = compile_parts(launch, 90).asm["ptx"]
    assert "mma.sync" in text
    assert "wgmma" not in text


@pytest.mark.slow
def test_float32_has_four_warps_where_there_are_no_warp_groups(monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "has_warp_groups", lambda device: False)
    launch = make_launch(torch.float32, 128)
    assert launch.plan.options["num_warps"] == 4
    assert assemble(compile_parts(launch, 80), 80, tmp_path).spilled_bytes == 0


@pytest.mark.slow
def test_more_warps_would_multiply_as_a_group():
    """What `WARP_GROUP` guards against."""
    request = MANY_ROWS["16 rows, long blocks"].build(torch.device("cpu"))
    compiled = compile_parts(plan_launch(request), 90, num_warps=plan.WARP_GROUP, ROWS=16)
    assert "wgmma" in compiled.asm["ptx"]


@pytest.mark.costly
@pytest.mark.parametrize("architecture", [80, 90])
def test_a_launch_at_fixed_addresses_compiles(architecture, tmp_path):
    request = make_launch(torch.bfloat16, 128, **DEFAULTS).request
    launch = FixedLaunch(request, FixedPlan.of(request, 2048, 128), torch.zeros(1, dtype=torch.int32))
    assert launch.plan.options["WINDOW_TILES"] == 2
    assert assemble(compile_parts(launch, architecture), architecture, tmp_path).spilled_bytes <= 512


DISASSEMBLED = """
.L_x_1:
        /*0000*/                   LDG.E R4, desc[UR14][R4.64] ;
.L_x_2:
        /*0010*/                   HMMA.16816.F32.BF16 R4, R4, R8, RZ ;
        /*0020*/                   HMMA.16816.F32.BF16 R4, R4, R8, RZ ;
        /*0030*/              @!P2 BRA `(.L_x_2) ;
        /*0040*/                   FADD R1, R1, R2 ;
        /*0050*/               @P0 BRA `(.L_x_3) ;
        /*0060*/                   BRA `(.L_x_1) ;
.L_x_3:
        /*0070*/                   EXIT ;
"""


def test_loops_lie_between_a_label_and_a_branch_back():
    assert find_loops(DISASSEMBLED) == [Loop(3, 2), Loop(7, 2)]


@pytest.mark.slow
def test_the_loop_over_tiles_has_the_products_of_a_tile(tmp_path):
    """Of 64 tokens by 128 channels with 8 queries: 16 x 8 x 16 each, keys and values, by two warps."""
    launch = make_launch(torch.bfloat16, 128, nbits_v=4)
    loop = measure_loop(assemble(compile_parts(launch, 90), 90, tmp_path))
    assert loop.products == 2 * (64 // 16) * (128 // 16) // launch.plan.options["num_warps"]
    assert 300 < loop.instructions < 3000


@pytest.fixture
def launched(monkeypatch):
    """The arguments by name of a step's launches, which are noted and not run."""
    from kvq.attention.kernels.triton import programs

    noted = {}
    for name in ("attend_parts", "combine"):
        program = getattr(programs, name)

        def launch(*given, name=name, program=program, **named):
            places = [one for one in program.arg_names if one not in named]
            noted[name] = program, dict(zip(places, given, strict=True)), named

        monkeypatch.setattr(programs, name, defaultdict(lambda launch=launch: launch))
    make_launch(torch.bfloat16, 128, nbits_v=4).run()
    return noted


@pytest.mark.parametrize("architecture", [80, 90])
def test_the_merge_compiles(launched, architecture, tmp_path):
    compiled = compile_for(*launched["combine"], architecture)
    assert assemble(compiled, architecture, tmp_path).spilled_bytes == 0


@pytest.mark.parametrize("name", ["attend_parts", "combine"])
def test_a_launch_says_whether_products_and_sums_are_fused(launched, name):
    """Triton 3.9 warns of one that does not, once in a process, on whose behalf it compiles."""
    program, arguments, options = launched[name]
    assert options["enable_fp_fusion"] is True
    if hasattr(triton_words := import_module("triton._utils"), "warn_once"):
        triton_words.warn_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = compile_for(program, arguments, options, 80).asm["ptx"]
    assert "fma.rn" in text


@pytest.mark.costly
@pytest.mark.parametrize("sample", [TIMED, *CHECKS], ids=str)
def test_what_a_trial_asks_for_compiles(sample):
    """Triton wants both ways of an `if` to have the same types; its interpreter does not look."""
    request = sample.build(torch.device("cpu"))
    if TRITON.why_unsupported(request) is None:
        assert compile_parts(plan_launch(request), 80).asm["ptx"]


@pytest.mark.slow
def test_too_few_registers_would_spill(tmp_path):
    """What the number of `REGISTERS` guards against: the same program with fewer."""
    launch = make_launch(torch.bfloat16, 128, nbits_v=4)
    assert assemble(compile_parts(launch, 90, maxnreg=96), 90, tmp_path).spilled_bytes > 400
