"""The engines, and the settings of their key-value caches that are emulated here, with where they are documented."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch

from kvq.errors import EvaluationError
from kvq.exporting.float_formats import Float4, Float8, Float8PerToken
from kvq.exporting.ggml_formats import GgmlFormat
from kvq.exporting.integer_formats import Int4PerToken, Int8BetweenExtremes, Int8PerTensor, Int8PerToken, MlxAffine
from kvq.exporting.state_format import FullPrecision, Rotated, StateFormat


@dataclass(frozen=True)
class EngineSetting:
    """One way to set an engine's cache.

    Attributes:
        label: its name, for a table.
        key: the format of the keys.
        value: the format of the values.
        arguments: the arguments of the engine's command that choose it.
        file: lines of a configuration file that choose it, where the engine wants one.
        remarks: what one must know to use it.
    """

    label: str
    key: StateFormat
    value: StateFormat
    arguments: tuple[str, ...] = ()
    file: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    def fits(self, head_dim: int) -> bool:
        """Return whether heads of `head_dim` elements can be stored so."""
        return self.key.fits(head_dim) and self.value.fits(head_dim)


@dataclass(frozen=True)
class Engine:
    """An engine.

    Attributes:
        name: what `--to` calls it.
        command: how it is started; the arguments of a setting follow.
        settings: those that are emulated; of two that are equally near, the first.
        source: where the engine documents them.
        sides_differ: whether keys and values may have formats of their own.
        skip_option: the option that names layers to keep in full precision; empty: there is none.
        remarks: what is true of all settings.
    """

    name: str
    command: tuple[str, ...]
    settings: tuple[EngineSetting, ...]
    source: str
    sides_differ: bool = False
    skip_option: str = ""
    remarks: tuple[str, ...] = ()


def find_engine(name: str) -> Engine:
    """Return an engine by name.

    Raises:
        EvaluationError: there is none of that name.
    """
    if name not in ENGINES:
        raise EvaluationError(f"--to {name!r} is not an engine that kvq knows; choose one of {', '.join(ENGINES)}")
    return ENGINES[name]


def _alike(label: str, one: StateFormat, arguments: Sequence[str], *remarks: str) -> EngineSetting:
    return EngineSetting(label, one, one, arguments=tuple(arguments), remarks=remarks)


_UNSCALED = "without scales in the checkpoint the states are cast as they are (scale 1.0), which is emulated"
_TRITON_ONLY = "the Triton attention backend only"


def _vllm() -> Engine:
    formats: list[tuple[StateFormat, str]] = [
        (Float8("fp8_e4m3", torch.float8_e4m3fn), _UNSCALED),
        (Float8("fp8_e5m2", torch.float8_e5m2), _UNSCALED),
        (Int8PerToken("int8_per_token_head"), _TRITON_ONLY),
        (Float8PerToken("fp8_per_token_head"), _TRITON_ONLY),
        (
            Rotated(Int4PerToken("int4_per_token_head"), least=2, seed=0),
            f"{_TRITON_ONLY}; signs of the rotation differ",
        ),
    ]
    return Engine(
        name="vllm",
        command=("vllm", "serve", "MODEL"),
        settings=tuple(_alike(one.name, one, ("--kv-cache-dtype", one.name), remark) for one, remark in formats),
        source="https://docs.vllm.ai/en/latest/features/quantization/quantized_kvcache/",
        skip_option="--kv-cache-dtype-skip-layers",
        remarks=("its nvfp4 and turboquant types are not emulated here",),
    )


def _sglang() -> Engine:
    option = "--kv-cache-dtype"
    int8 = ("--int8-kv-cache", "--attention-backend", "triton", "--page-size", "1")
    return Engine(
        name="sglang",
        command=("python", "-m", "sglang.launch_server", "--model-path", "MODEL"),
        settings=(
            _alike("fp8_e4m3", Float8("fp8_e4m3", torch.float8_e4m3fn), (option, "fp8_e4m3"), _UNSCALED),
            _alike("fp8_e5m2", Float8("fp8_e5m2", torch.float8_e5m2), (option, "fp8_e5m2"), _UNSCALED),
            _alike("int8", Int8BetweenExtremes("int8"), int8, "newer releases only"),
            _alike("fp4_e2m1", Float4("fp4_e2m1", "mx"), (option, "fp4_e2m1"), "experimental there"),
        ),
        source="https://docs.sglang.io/advanced_features/quantized_kv_cache.html",
    )


def _llama_cpp() -> Engine:
    plain = [
        GgmlFormat("q8_0", 8, has_minimum=False),
        GgmlFormat("q5_1", 5, has_minimum=True),
        GgmlFormat("q5_0", 5, has_minimum=False),
        GgmlFormat("q4_1", 4, has_minimum=True),
        GgmlFormat("q4_0", 4, has_minimum=False),
    ]
    keys: list[StateFormat] = [FullPrecision(), *(Rotated(one) for one in plain)]
    values: list[StateFormat] = [FullPrecision(), *(Rotated(one, block=64) for one in plain)]
    return Engine(
        name="llama.cpp",
        command=("llama-server", "-m", "MODEL.gguf"),
        settings=tuple(
            EngineSetting(
                f"K {key.name}, V {value.name}",
                key,
                value,
                arguments=("-fa", "on", "-ctk", key.name, "-ctv", value.name),
            )
            for key, value in list(product(keys, values))[1:]
        ),
        source="https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md",
        sides_differ=True,
        remarks=(
            "quantized values need flash attention (-fa on)",
            "heads of a multiple of 64 elements are rotated by a Hadamard transform since April 2026 "
            "(ggml-org/llama.cpp#21038), which is emulated; LLAMA_ATTN_ROT_DISABLE=1 switches it off",
            "a CUDA build reads keys and values of different types only with GGML_CUDA_FA_ALL_QUANTS",
            "its iq4_nl is not emulated here",
        ),
    )


def _tensorrt_llm() -> Engine:
    option = ("--extra_llm_api_options", "kv.yaml")
    float8 = Float8("fp8", torch.float8_e4m3fn)
    return Engine(
        name="tensorrt-llm",
        command=("trtllm-serve", "MODEL"),
        settings=(
            EngineSetting("fp8", float8, float8, option, ("kv_cache_config:", "  dtype: fp8"), (_UNSCALED,)),
            EngineSetting(
                "int8",
                Int8PerTensor("int8"),
                Int8PerTensor("int8"),
                file=("quantization:", "  kv_cache_quant_algo: INT8"),
                remarks=(
                    "the fields go into the checkpoint's config.json, for an engine that is built ahead (the TensorRT "
                    "backend); scales come from a calibration, here from the first forward",
                ),
            ),
            EngineSetting(
                "nvfp4",
                Float4("nvfp4", "nv"),
                Float4("nvfp4", "nv"),
                option,
                ("kv_cache_config:", "  dtype: nvfp4"),
                (
                    "the checkpoint must have been calibrated with ModelOpt; here the first forward calibrates",
                    "Blackwell",
                ),
            ),
        ),
        source="https://nvidia.github.io/TensorRT-LLM/features/quantization.html",
    )


def _mlx() -> Engine:
    return Engine(
        name="mlx",
        command=("mlx_lm.generate", "--model", "MODEL"),
        settings=tuple(
            _alike(
                f"{bits} bits, groups of {size}",
                MlxAffine(f"{bits} bits", bits, size),
                ("--kv-bits", str(bits), "--kv-group-size", str(size), "--quantized-kv-start", "0"),
            )
            for bits, size in product((8, 4, 2), (64, 32, 128))
        ),
        source="https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/generate.py",
        remarks=("without --quantized-kv-start 0 it quantizes only caches of 5,000 tokens and more",),
    )


ENGINES = {engine.name: engine for engine in (_vllm(), _sglang(), _llama_cpp(), _tensorrt_llm(), _mlx())}
"""The engines by name."""
