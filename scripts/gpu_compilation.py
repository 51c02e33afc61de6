"""Compile the Triton programs for GPUs without one, and read what the assembler and the disassembler say of them.

Triton and the tools of CUDA that it brings suffice.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvq.attention.dispatch.request import AttentionRequest
from kvq.attention.kernels.triton.chunk_table import get_chunk_table
from kvq.attention.kernels.triton.launch import Launch
from kvq.attention.kernels.triton.plan import get_plan

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


@dataclass(frozen=True)
class Assembled:
    """A program in the machine language of a GPU.

    Attributes:
        spilled_bytes: of each thread, which its registers do not hold.
        registers: of each thread.
        cubin: the file.
    """

    spilled_bytes: int
    registers: int
    cubin: Path


@dataclass(frozen=True)
class Loop:
    """The loop over the stored tiles.

    Attributes:
        instructions: of one warp for one tile.
        products: those of them that are products of matrices.
    """

    instructions: int
    products: int


def plan_launch(request: AttentionRequest) -> Launch:
    """Return the launch that serves a request on the processor, with a table of its addresses."""
    table = get_chunk_table(request.pair, torch.device("cpu"))
    return Launch(request, table, get_plan(request, table))


def compile_for(function: Any, arguments: Mapping[str, Any], options: Mapping[str, Any], architecture: int) -> Any:
    """Compile a program as its launch with these arguments would: sizes that 16 divides, and 1, are known to it.

    Args:
        function: the program.
        arguments: those of a launch, by name.
        options: its compile-time arguments, and what Triton is told about its launch.
        architecture: the compute capability, e.g. 90.
    """
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


def compile_parts(launch: Launch, architecture: int, **changes: Any) -> Any:
    """Compile the program that attends, as a launch would; `changes` are other options than those of its plan."""
    from kvq.attention.kernels.triton.programs import attend_parts

    names = [name for name in attend_parts.arg_names if name not in launch.plan.options]
    arguments = dict(zip(names, launch.attend_arguments(*launch._new_parts()), strict=True))
    return compile_for(attend_parts, arguments, {**launch.plan.options, **changes}, architecture)


def assemble(compiled: Any, architecture: int, folder: Path) -> Assembled:
    """Assemble a compiled program into a folder.

    Raises:
        RuntimeError: the assembler fails.
    """
    ptx, cubin = folder / "program.ptx", folder / "program.cubin"
    ptx.write_text(compiled.asm["ptx"])
    name = f"sm_{architecture}" + ("a" if architecture >= 90 else "")
    # Triton 3.9 writes a newer PTX than its older assembler reads, and brings another one.
    for assembler in sorted(_tools().glob("ptxas*")):
        done = _run(assembler, "-v", f"--gpu-name={name}", ptx, "-o", cubin)
        if "Unsupported .version" not in done.stderr and "is not defined for option 'gpu-name'" not in done.stderr:
            break
    if done.returncode:
        raise RuntimeError(done.stderr)
    spilled, registers = (re.findall(text, done.stderr)[0] for text in (r"(\d+) bytes spill st", r"Used (\d+) regi"))
    return Assembled(int(spilled), int(registers), cubin)


def measure_loop(assembled: Assembled) -> Loop:
    """Return the size of the loop with the most products of matrices.

    Raises:
        RuntimeError: the disassembler fails, or there is no such loop.
    """
    done = _run(_tools() / "nvdisasm", "-c", assembled.cubin)
    if done.returncode:
        raise RuntimeError(done.stderr)
    loops = find_loops(done.stdout)
    if not loops:
        raise RuntimeError("the program has no loop")
    return max(loops, key=lambda loop: (loop.products, -loop.instructions))


def find_loops(text: str) -> list[Loop]:
    """Return the loops of a disassembled program: what lies between a label and a branch back to it."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    loops = []
    for line in text.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = len(instructions)
        code = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line)
        if code is None:
            continue
        instructions.append(code[1])
        branch = re.search(r"\bBRA\b.*?(\.L_x_\d+)", code[1])
        if branch and branch[1] in labels:
            body = instructions[labels[branch[1]] :]
            products = sum(bool(re.search(r"\b[HQIO]?G?MMA\b", one)) for one in body)
            loops.append(Loop(len(body), products))
    return loops


def _run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)  # noqa: S603  # the tools that Triton brings


def _tools() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
