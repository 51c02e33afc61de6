"""The Triton programs compile for GPUs without one, and their registers suffice: `ptxas` says how many spill."""

from __future__ import annotations

import re
import subprocess
import warnings
from collections import defaultdict
from importlib import import_module
from pathlib import Path

import pytest
import torch
from interpreted_triton import DEFAULTS, PLAIN

from kvq import KVQ
from kvq.attention.dispatch.request import AttentionRequest
from kvq.attention.kernels.triton.chunk_table import get_chunk_table
from kvq.attention.kernels.triton.kernel import LEAST_TRITON, TRITON, _find_missing_triton
from kvq.attention.kernels.triton.launch import Launch
from kvq.attention.kernels.triton.plan import get_plan
from kvq.attention.proving.trial import CHECKS, TIMED

pytestmark = pytest.mark.skipif(_find_missing_triton() is not None, reason=f"needs triton {LEAST_TRITON} or newer")

NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
}
TYPES = {int: "i32", float: "fp32"}
LAUNCH_OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
"""Words of Triton's own among the arguments of a launch."""


def make_launch(dtype, head_dim, **fields):
    cache = KVQ({"backend": "native", **PLAIN, **fields})
    states = torch.randn(1, 1, 700, head_dim, dtype=dtype)
    cache.update(states, states, 0)
    pair = cache.layers[0].update(states[:, :, :1], states[:, :, :1], packed=True)[0].pair
    request = AttentionRequest(torch.randn(1, 4, 1, head_dim, dtype=dtype), pair, None, scaling=1.0)
    assert TRITON.why_unsupported(request) is None
    return plan_launch(request)


def plan_launch(request):
    table = get_chunk_table(request.pair, torch.device("cpu"))
    return Launch(request, table, get_plan(request, table))


def compile_for(function, arguments, options, architecture):
    """Compile a program as its launch with these arguments would: sizes that 16 divides, and 1, are known to it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = dict(options)
    launch = {name: options.pop(name) for name in LAUNCH_OPTIONS if name in options}
    constants = dict(options)
    signature, attributes = {}, {}
    for place, name in enumerate(function.arg_names):
        value = arguments.get(name)
        if isinstance(value, int) and value == 1:
            constants[name] = 1
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = f"*{NAMES[value.dtype]}" if isinstance(value, torch.Tensor) else TYPES[type(value)]
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    places = {(function.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(function, signature, places, attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch)


def resources(compiled, architecture, tmp_path):
    """Return spilled bytes and registers of a thread, as the assembler reports them."""
    import triton

    file = tmp_path / "program.ptx"
    file.write_text(compiled.asm["ptx"])
    name = f"sm_{architecture}" + ("a" if architecture >= 90 else "")
    options = ["-v", f"--gpu-name={name}", str(file), "-o", str(tmp_path / "program.cubin")]
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    # Triton 3.9 writes a newer PTX than its older assembler reads, and brings another one.
    for assembler in sorted(folder.glob("ptxas*")):
        done = subprocess.run([assembler, *options], capture_output=True, text=True, check=False)
        if "Unsupported .version" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    said = done.stderr
    return int(re.findall(r"(\d+) bytes spill stores", said)[0]), int(re.findall(r"Used (\d+) registers", said)[0])


def compile_parts(launch, architecture, **changes):
    from kvq.attention.kernels.triton.programs import attend_parts

    names = [name for name in attend_parts.arg_names if name not in launch.plan.options]
    arguments = dict(zip(names, launch.attend_arguments(*launch._new_parts()), strict=True))
    return compile_for(attend_parts, arguments, {**launch.plan.options, **changes}, architecture)


@pytest.mark.parametrize(
    ("architecture", "head_dim", "dtype", "fields", "most_spilled"),
    [
        # By Triton 3.7 and 3.9: 84 and 260, 60 and 140, 88 and 144; with 96 registers from 424 on.
        (90, 128, torch.bfloat16, {"nbits_v": 4}, 400),
        (80, 128, torch.bfloat16, {"nbits_v": 4, "q_group_size": {"key": 64, "value": 128}}, 400),
        pytest.param(80, 128, torch.bfloat16, {"nbits_v": 4}, 400, marks=pytest.mark.slow),
        pytest.param(90, 128, torch.bfloat16, DEFAULTS, 512, marks=pytest.mark.slow),
        pytest.param(90, 128, torch.bfloat16, {**DEFAULTS, "metadata_dtype": "int8"}, 400, marks=pytest.mark.slow),
        pytest.param(80, 256, torch.bfloat16, DEFAULTS, 512, marks=pytest.mark.slow),
        pytest.param(90, 128, torch.float16, {"nbits_k": 7, "nbits_v": 7}, 512, marks=pytest.mark.slow),
        pytest.param(90, 128, torch.float32, {}, 0, marks=pytest.mark.slow),
        pytest.param(90, 80, torch.bfloat16, {"axis_key": "per_token"}, 512, marks=pytest.mark.slow),
        pytest.param(90, 256, torch.bfloat16, {}, 512, marks=pytest.mark.slow),
        pytest.param(80, 256, torch.bfloat16, {}, 512, marks=pytest.mark.slow),
    ],
)
def test_a_program_keeps_to_its_registers_and_reads_in_wide_loads(
    architecture, head_dim, dtype, fields, most_spilled, tmp_path
):
    compiled = compile_parts(make_launch(dtype, head_dim, **fields), architecture)
    spilled, registers = resources(compiled, architecture, tmp_path)
    assert spilled <= most_spilled
    assert 32 <= registers <= 255
    text = compiled.asm["ptx"]
    assert "mma" in text, "products run on tensor cores"
    # Codes come 16 bytes at a time; the single bytes are exponents, one for each side and kind of metadata, or these.
    assert len(re.findall(r"ld\.global(?:\.\w+)*\.v\d|cp\.async", text)) >= 2
    assert len(re.findall(r"ld\.global(?:\.\w+)*\.[bu]8\b", text)) <= (10 if "metadata_dtype" in fields else 8)


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
    spilled, _ = resources(compile_for(*launched["combine"], architecture), architecture, tmp_path)
    assert spilled == 0


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
    assert resources(compile_parts(launch, 90, maxnreg=96), 90, tmp_path)[0] > 400
