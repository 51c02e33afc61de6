"""The Triton programs compile for GPUs without one, and their registers suffice: `ptxas` says how many spill."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

from kvq import KVQ
from kvq.attention.dispatch.request import AttentionRequest
from kvq.attention.kernels.triton.chunk_table import get_chunk_table
from kvq.attention.kernels.triton.kernel import LEAST_TRITON, TRITON, _find_missing_triton, _Launch

pytestmark = pytest.mark.skipif(_find_missing_triton() is not None, reason=f"needs triton {LEAST_TRITON} or newer")

NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
TABLES = {"key_table": "i64", "key_blocks": "i64", "value_table": "i64", "value_blocks": "i64"}
OTHERS = {"stored_length": "i32", "starts": "i32", "mask": "u8", "peaks": "fp32", "totals": "fp32", "outputs": "fp32"}
STATES = ("exact_query", "window_key", "window_value", "new_key", "new_value", "sink_key", "sink_value")


def make_launch(dtype, head_dim, **fields):
    cache = KVQ({"backend": "native", **fields})
    states = torch.randn(1, 1, 700, head_dim, dtype=dtype)
    cache.update(states, states, 0)
    pair = cache.layers[0].update(states[:, :, :1], states[:, :, :1], packed=True)[0].pair
    request = AttentionRequest(torch.randn(1, 4, 1, head_dim, dtype=dtype), pair, None, scaling=1.0)
    assert TRITON.why_unsupported(request) is None
    return _Launch(request, get_chunk_table(pair, torch.device("cpu")))


def compile_for(function, pointers, scalars, options, architecture):
    """Compile a program as its first launch would; strides and lengths are integers, pointers aligned."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = dict(options)
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages") if name in options}
    signature, attributes = {}, {}
    for place, name in enumerate(function.arg_names):
        if name in options:
            signature[name] = "constexpr"
        elif name in pointers:
            signature[name] = f"*{pointers[name]}"
            attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = scalars.get(name, "i32")
    constants = {(function.arg_names.index(name),): value for name, value in options.items()}
    source = ASTSource(function, signature, constants, attributes)
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


def compile_parts(launch, architecture):
    from kvq.attention.kernels.triton import programs

    state = NAMES[launch.request.query.dtype]
    query = state if launch.key.rotation is None else "fp32"
    pointers = {**TABLES, **OTHERS, **dict.fromkeys(STATES, state), "query": query}
    scalars = {"scaling": "fp32", "softcap": "fp32"}
    return compile_for(programs.attend_parts, pointers, scalars, launch.options(), architecture)


@pytest.mark.parametrize(
    ("architecture", "head_dim", "dtype", "fields", "most_spilled"),
    [
        (90, 128, torch.bfloat16, {"nbits_v": 4}, 0),
        (80, 128, torch.bfloat16, {"nbits_v": 4, "q_group_size": {"key": 64, "value": 128}}, 0),
        pytest.param(80, 128, torch.bfloat16, {"nbits_v": 4}, 0, marks=pytest.mark.slow),
        pytest.param(90, 128, torch.float16, {"nbits_k": 7, "nbits_v": 7}, 0, marks=pytest.mark.slow),
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
    # Codes come 16 bytes at a time; the single bytes are exponents, one for each side and kind of metadata.
    assert len(re.findall(r"ld\.global(?:\.\w+)*\.v\d|cp\.async", text)) >= 2
    assert len(re.findall(r"ld\.global(?:\.\w+)*\.[bu]8\b", text)) <= 8


@pytest.mark.parametrize("architecture", [80, 90])
def test_the_merge_compiles(architecture, tmp_path):
    from kvq.attention.kernels.triton import programs

    pointers = dict.fromkeys(("peaks", "totals", "outputs", "sink_logits", "stored_output"), "fp32")
    constants = {"VALUE_DIM": 128, "VALUE_PADDED": 128, "QUERIES": 1, "HAS_LOGITS": True, "APART": False}
    compiled = compile_for(programs.combine, {**pointers, "output": "bf16"}, {}, constants, architecture)
    spilled, _ = resources(compiled, architecture, tmp_path)
    assert spilled == 0


@pytest.mark.slow
def test_too_many_elements_for_the_warps_would_spill(tmp_path):
    """What the limits of `WARPS` guard against: the same program on half as many warps."""
    launch = make_launch(torch.bfloat16, 128, nbits_v=4, q_group_size={"key": 64, "value": 128})
    options = {**launch.options(), "num_warps": 4}
    launch.options = lambda: options
    assert resources(compile_parts(launch, 90), 90, tmp_path)[0] > 0
