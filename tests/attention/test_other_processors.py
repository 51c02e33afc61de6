"""The C file on other processors: plain x86-64, AVX, AVX2; AVX-512, AVX-VNNI and ARM lane by lane; ARM under qemu.

The same requests are answered by a program without Python, built by another compiler or with other flags, and compared
with attention in fp64.
"""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from codebook_groups import spec_of as codebook_of
from written_requests import read_output, write_request

from kvq.attention.kernels.compiled import library
from kvq.attention.kernels.compiled.compiler import _COMMON_FLAGS

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
PADDED = torch.ones(2, 1, 1, 334, dtype=torch.bool)
PADDED[0, ..., :41] = False
SWAPPED = dict(axis_key="per_token", axis_value="per_channel")
REQUESTS = {
    "plain": {},
    "head dim 67": dict(head_dim=67),
    "head dim 128 in groups of 64": dict(head_dim=128, q_group_size=64, sharing=4),
    "groups of 128 tokens": dict(head_dim=128, q_group_size=128, sharing=4, axis_value="per_channel"),
    "2 bit in groups of 64 tokens": dict(
        head_dim=128, q_group_size=64, nbits_k=2, nbits_v=2, axis_value="per_channel", tokens=700
    ),
    "swapped": dict(head_dim=64, **SWAPPED),
    **{f"{bits} bit": dict(nbits_k=bits, nbits_v=bits, head_dim=64) for bits in range(1, 9)},
    "groups of 40": dict(head_dim=80, q_group_size=40, axis_key="per_token"),
    "groups of 25": dict(head_dim=100, axis_key="per_token"),
    "swapped 5 bit": dict(nbits_k=5, nbits_v=3, **SWAPPED),
    "sinks, padding, mask": dict(sink_length=5, padding=(41, 0), mask=PADDED),
    "additive mask": dict(mask=torch.linspace(-3, 3, 6 * 334).reshape(1, 6, 1, 334)),
    "balanced": dict(axis_value="per_channel", balance_k="rms", balance_v="rms", octaves=6.0),
    "rotated, softcap, logits": dict(
        rotation_k="hadamard", rotation_v="hadamard", softcap=3.0, sink_logits=torch.linspace(-2, 6, 6)
    ),
    "reordered": dict(rows=[1, 0], sink_length=3),
    "three queries": dict(queries=3),
    "bfloat16": dict(dtypes=(BF16, BF16, BF16), head_dim=64),
    "float16": dict(dtypes=(F16, F16, F16), head_dim=64),
    "mixed": dict(dtypes=(F32, F32, BF16), head_dim=64),
    "huge": dict(magnitude=1e20),
    "tiny": dict(magnitude=1e-20),
    "float32 metadata": dict(metadata_dtype="float32"),
    "metadata in bytes": dict(metadata_dtype="int8"),
    **{
        f"{bits} bit in groups of {group} tokens": dict(
            nbits_k=bits, nbits_v=bits, head_dim=64, q_group_size=group, axis_value="per_channel"
        )
        for bits in (8, 4)
        for group in (8, 16, 24)
    },
    **{
        f"codebook of {2**bits}": dict(
            backend=codebook_of(), nbits_k=bits, nbits_v=3, axis_key="per_token", head_dim=dim
        )
        for bits, dim in ((2, 64), (4, 67), (8, 40))
    },
    "window only": dict(tokens=40),
}
BOUNDS = {F32: 1e-4, F16: 1e-3, BF16: 8e-3}

X86 = platform.machine() in ("x86_64", "AMD64")
EMULATED = str(Path(__file__).with_name("emulated_vectors.h"))
ARM = "aarch64-linux-gnu-gcc"
NATIVE = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), "cc")


def can_run(feature):
    facts = Path("/proc/cpuinfo")
    return feature in facts.read_text(encoding="utf-8").split() if facts.exists() else False


TARGETS = {
    "x86-64": (X86, NATIVE, ["-march=x86-64"], []),
    "x86-64 with AVX": (X86 and can_run("avx"), NATIVE, ["-march=x86-64", "-mavx"], []),
    "x86-64 with AVX2": (X86 and can_run("avx2"), NATIVE, ["-march=x86-64-v3"], []),
    "x86-64 with AVX-512, emulated": (X86 and can_run("avx2"), NATIVE, ["-march=x86-64-v3", "-include", EMULATED], []),
    "x86-64 with AVX-VNNI, emulated": (
        X86 and can_run("avx2"),
        NATIVE,
        ["-march=x86-64-v3", "-DEMULATE_AVX_VNNI", "-include", EMULATED],
        [],
    ),
    "ARM with dot products, emulated": (X86, NATIVE, ["-march=x86-64", "-DEMULATE_ARM", "-include", EMULATED], []),
    "widened codes": (True, NATIVE, ["-DKVQ_WIDEN_CODES"], []),
    "aarch64": (True, ARM, ["-static"], ["qemu-aarch64"]),
    "aarch64 with dot products": (True, ARM, ["-static", "-march=armv8.2-a+dotprod"], ["qemu-aarch64"]),
}


@pytest.fixture
def build(tmp_path):
    """Build the program for a target, with what is the same for all of them in the product; return its command."""

    def make(target):
        is_here, compiler, flags, emulator = TARGETS[target]
        if not is_here:
            pytest.skip(f"not a processor for {target}")
        for program in (compiler, *emulator):
            if shutil.which(program) is None:
                pytest.skip(f"{program} is not there")
        common = [flag for flag in _COMMON_FLAGS if flag not in ("-shared", "-fPIC")]
        sources = [str(library.SOURCE), str(Path(__file__).with_name("replay.c"))]
        program = str(tmp_path / "replay")
        command = [compiler, *common, *flags, "-w", *sources, "-o", program, "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return [*emulator, program]

    return make


@pytest.mark.slow
@pytest.mark.costly
@pytest.mark.case("the C kernel on ARM and on x86-64 without AVX", "the same numbers")
@pytest.mark.parametrize("target", TARGETS)
def test_every_processor_gives_the_same_numbers(
    build, target, make_request, reference, error_of, tmp_path, monkeypatch
):
    program = build(target)
    requests = {name: make_request(**fields) for name, fields in REQUESTS.items()}
    files = []
    for number, request in enumerate(requests.values()):
        files += [tmp_path / f"{number}.request", tmp_path / f"{number}.output"]
        files[-2].write_bytes(write_request(request, monkeypatch))
    subprocess.run([*program, *map(str, files)], timeout=300, check=True)
    errors = {}
    for (name, request), file in zip(requests.items(), files[1::2], strict=True):
        error = error_of(read_output(file.read_bytes(), request), reference(request))
        if not error < BOUNDS[request.query.dtype]:
            errors[name] = error
    assert errors == {}


def test_a_written_request_has_everything(make_request, monkeypatch):
    request = make_request(sink_length=5, rows=[1, 0], rotation_k="hadamard", mask=PADDED)
    data = write_request(request, monkeypatch)
    for part in request.pair.value.store.segments[0].parts.values():
        assert bytes(part.contiguous().view(torch.uint8).flatten().tolist()) in data
