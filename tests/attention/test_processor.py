"""What a processor is told apart by: a library that is built for one must not be loaded on another."""

import platform

import pytest

from kvq.attention.machine import processor

X86 = """
processor\t: {number}
model name\t: Some Processor
cpu MHz\t\t: {mhz}
flags\t\t: fpu sse2 {flags}
"""
ARM = """
processor\t: {number}
BogoMIPS\t: {mhz}
Features\t: fp asimd {flags}
CPU implementer\t: 0x41
"""


@pytest.fixture(params=[X86, ARM], ids=["x86", "arm"])
def describe(request, monkeypatch):
    """Return a function that describes a processor of two cores from what the system tells of it."""

    def call(flags, mhz):
        lines = "".join(request.param.format(number=core, mhz=mhz + core, flags=flags) for core in (0, 1)).splitlines()
        monkeypatch.setattr(processor, "_read_facts", lambda: lines)
        return processor.describe_processor.__wrapped__()

    return call


def test_other_instructions_are_another_processor(describe):
    assert describe("avx2", 2000) != describe("avx2 avx512f", 2000)
    assert "avx2" in describe("avx2", 2000)


def test_another_clock_is_the_same_processor(describe):
    assert describe("avx2", 2000) == describe("avx2", 3000)


def test_where_the_system_tells_nothing_python_is_asked(monkeypatch):
    monkeypatch.setattr(processor, "_read_facts", list)
    monkeypatch.setattr(platform, "processor", lambda: "some processor")
    assert processor.describe_processor.__wrapped__() == "some processor"
    assert processor.name_processor.__wrapped__() == "some processor"
