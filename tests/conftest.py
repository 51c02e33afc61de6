"""What several test files share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
import transformers
from packaging.version import Version

from kvq.plugin_api import API_VERSION, BackendOptions, BackendSpec, Capabilities, QuantSpec
from kvq.registry import register_backend

NO_PICTURES = "the extra `plot` is not part of that environment"
NO_FP8 = "transformers has no fp8 cache before 5.23"
NO_COMPILED_MODEL = "torch 2.6 compiles no model of transformers 5.17, with DynamicCache neither"
NO_ENTRY = "DynamicCache of 5.17 has no entry for a layer that reads another's, so that a plan has no row for it"
GQA_FLASH = "flash attention of torch 2.6 shares no heads on a processor"
GQA_COPIES = "SDPA of torch 2.6 repeats and scales the keys and values of grouped heads in copies"
TORCH_2_6 = "its CUDA build prints a line on stderr, and rich 13.7 an empty one"
DRAFTS_MASK = "transformers 5.17 cuts the mask of drafts to the length of the new tokens, with DynamicCache too"
OLDEST_LACKS = {
    **{
        f"attention/test_compile.py::test_{name}": NO_COMPILED_MODEL
        for name in (
            "a_step_is_one_graph_and_no_step_adds_another[2000]",
            "a_step_is_one_graph_and_no_step_adds_another[200]",
            "the_graphs_of_one_cache_serve_another",
            "a_compiler_that_rewrites_graphs_drops_no_step",
            "the_default_compiler",
            "generate_with_padding",
            "layers_that_slide[keep]",
            "layers_that_slide[quantize]",
            "gradients_flow_as_without_a_compiler",
            "export_is_refused_by_both_ways",
            "models_whose_layers_share_states_are_compiled_around_the_cache",
            *(
                f"other_uses_of_the_keys_break_the_graph_and_change_nothing[{use}]"
                for use in ("shape", "method", "function", "operator")
            ),
        )
    },
    "benchmark/test_device_proof.py::test_ways_are_tried_at_one_size_and_the_best_at_all": GQA_FLASH,
    "benchmark/test_device_proof.py::test_a_step_and_the_buffer_have_the_same_tokens": GQA_FLASH,
    "benchmark/test_runs.py::test_results_are_plain_values_and_ratios_are_those_of_their_samples": NO_PICTURES,
    "benchmark/test_runs.py::test_nothing_measured_cannot_be_drawn": NO_PICTURES,
    "benchmark/test_trials.py::test_each_contender_attends_to_the_same_states[transformers fp8]": NO_FP8,
    "benchmark/test_trials.py::test_caches_that_never_flush_foretell_none": NO_FP8,
    "benchmark/test_trials.py::test_transient_memory_is_that_of_what_is_copied[DynamicCache-1.0-1.1]": GQA_COPIES,
    "cli/test_bench_command.py::test_a_small_run_prints_a_table_and_writes_what_it_measured": NO_PICTURES,
    "cli/test_eval_command.py::test_a_run_is_a_table_a_file_and_a_picture": NO_PICTURES,
    "cli/test_eval_command.py::test_a_gate_that_is_met_exits_with_zero": TORCH_2_6,
    "cli/test_plan_command.py::test_a_plan_is_a_table_and_sentences": TORCH_2_6,
    **{
        f"cli/test_command_line.py::test_a_process_of_its_own_says_nothing_on_stderr[{command}]": TORCH_2_6
        for command in ("bench", "demo", "eval", "plan")
    },
    "devices/test_tensor_parallel.py::test_two_processes": "tensor parallelism of transformers needs a newer torch",
    "docs/test_documents.py::TestSchema::test_it_is_current": "older pydantic words the schema in another way",
    "evaluation/test_continuations.py::test_few_bits_show_and_padding_to_the_right_does_not": "other rounding",
    **{
        f"generation/test_from_evicted.py::test_drafts_go_on_without_padding[{name}]": DRAFTS_MASK
        for name in ("llama", "mistral")
    },
    "generation/test_untold.py::test_a_compiled_model_teaches_as_well": NO_COMPILED_MODEL,
    "test_planning.py::test_a_plan_holds_what_the_model_then_holds[opt]": "OPT of 5.17 reads data on the meta device",
    "test_planning.py::test_special_layers_say_why[gemma 4-5-reads another layer's keys and values]": NO_ENTRY,
    "test_bad_input.py::test_row[a crop by a positive number]": "DynamicCache of 5.17 takes positive numbers",
}
"""What is not tested on the oldest supported versions, and why."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what the oldest supported versions lack."""
    if Version(transformers.__version__) >= Version("5.18"):
        return
    for item in items:
        reason = OLDEST_LACKS.get(item.nodeid.removeprefix("tests/"))
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


# No test takes time, or depends on what was found about kernels on the machine that it runs on; processes that tests
# start inherit this. Built libraries are shared with the user's, so that none is compiled twice.
os.environ["KVQ_KERNEL_TRIALS"] = "off"
os.environ.pop("KVQ_ATTENTION_KERNEL", None)


@pytest.fixture(autouse=True)
def give_records(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Say which kernels have a record, on any processor: the compiled one, unless a test says else."""

    def give(*names: str) -> None:
        record = {"relative_error": 1e-6, "speedup": 2.0}
        monkeypatch.setattr(
            "kvq.attention.dispatch.standing.find_benchmark_record", lambda name, _: record if name in names else None
        )

    give("compiled")
    return give


@pytest.fixture(autouse=True)
def leave_compilers_alone(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that has quanto's C++ extension compiled, 90 s of a processor, unless it is marked `costly`."""
    before = has_quanto_extension()
    yield
    if has_quanto_extension() > before and request.node.get_closest_marker("costly") is None:
        pytest.fail("reading quanto's packed tensors compiles its extension: mark this test `costly`")


def has_quanto_extension() -> bool:
    """Return whether this process has built or loaded quanto's C++ extension."""
    module = sys.modules.get("optimum.quanto.library.extensions.extension")
    return any(extension._lib is not None for extension in getattr(module, "_extensions", {}).values())


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the kernels in torch alone read a history of some hundred tokens in several pieces, as they do a long one."""
    monkeypatch.setattr("kvq.attention.kernels.stored_pieces.PIECE_ELEMENTS", 1 << 13)


# The models are tiny and the tests run side by side: more threads than one each only get into each other's way.
torch.set_num_threads(1)


class RangeQuantizer:
    """Plain rounding between the least and the greatest element of a group."""

    group_local = True

    def __init__(self, nbits: float) -> None:
        self.max_code = int(2**nbits) - 1

    def encode(self, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        low, high = groups.aminmax(dim=-1)
        scale = (high - low) / self.max_code
        codes = ((groups - low[..., None]) / scale.clamp_min(1e-30)[..., None]).round()
        return codes.clamp(0, self.max_code).to(torch.uint8), scale, low


class RangeOptions(BackendOptions):
    rounds: int = 1
    thresholds: tuple[float, ...] = ()


def build_range_quantizer(spec: QuantSpec, _options: RangeOptions) -> RangeQuantizer:
    return RangeQuantizer(spec.nbits)


@pytest.fixture
def testing_backend() -> BackendSpec:
    """A backend called "testing" in the registry of the process: 1 to 8 and 2.5 bits, both granularities."""
    spec = BackendSpec(
        name="testing",
        api_version=API_VERSION,
        capabilities=Capabilities(nbits=(1, 2, 2.5, 3, 4, 5, 6, 7, 8)),
        build=build_range_quantizer,
        options=RangeOptions,
    )
    register_backend(spec, replace=True)
    return spec
