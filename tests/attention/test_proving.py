"""A kernel that needs proof is tried where it runs: what is found decides, is kept, and disturbs nothing.

Times are given, not taken, but for one test, which does not depend on what they are.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from torch.utils._python_dispatch import TorchDispatchMode

from kvq.attention.dispatch import standing
from kvq.attention.dispatch.kernel_cache import KernelCache
from kvq.attention.dispatch.kernel_registry import get_kernel_registry
from kvq.attention.entry import attend_packed
from kvq.attention.kernels.compiled import library
from kvq.attention.kernels.eager.kernel import REFERENCE, EagerKernel
from kvq.attention.proving import trial as proving
from kvq.attention.proving import verdicts
from kvq.attention.proving.samples import Sample
from kvq.errors import ConfigError
from kvq.layers.held_bytes import report_memory
from kvq.plugin_api.packed_format import get_packed_format
from kvq.store.packed_parts import read_levels

CPU = torch.device("cpu")


class Probe:
    """Computes as the reference does, but for requests of the kind that it gets wrong, and needs proof."""

    name = "probe"
    device_types = frozenset({"cpu", "cuda"})
    needs_benchmark = True
    source = "first"

    def __init__(self, is_wrong=lambda request: False):
        self.is_wrong = is_wrong
        self.asked = []

    def why_unavailable(self):
        return None

    def why_unsupported(self, request):
        return None

    def source_digest(self):
        return self.source

    def attend(self, request):
        self.asked.append(request)
        output = EagerKernel().attend(request)
        return output * 1.2 if self.is_wrong(request) else output


@pytest.fixture
def trials(monkeypatch, tmp_path, give_records):
    """Trials are on and nothing is known; a list of the kernels that were tried."""
    give_records()
    monkeypatch.setenv("KVQ_KERNEL_TRIALS", "on")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    verdicts._tell_once.cache_clear()
    tried, prove = [], standing.prove

    def note(kernel, *args):
        tried.append(kernel.name)
        return prove(kernel, *args)

    monkeypatch.setattr(standing, "prove", note)
    return tried


@pytest.fixture
def pace(monkeypatch):
    """Seconds that a step of each kernel takes, by its name; the clock on the wall ends nothing."""
    seconds = {"probe": 1.0, "eager": 2.5}
    monkeypatch.setattr(proving, "take_seconds", lambda step, device: step() or seconds[step.args[1].name])
    monkeypatch.setattr(proving, "BUDGET_SECONDS", 1e9)
    monkeypatch.setattr(proving, "TIMED", Sample(dtypes=proving.TIMED.dtypes))
    return seconds


@pytest.fixture
def put(put_kernels, trials, pace):
    """Make a probe the preferred kernel."""

    def build(*args):
        probe = Probe(*args)
        put_kernels(probe, REFERENCE)
        return probe

    return build


@pytest.fixture
def forget(put_kernels):
    """Begin a new process, as far as it concerns kernels."""
    return lambda: put_kernels(*get_kernel_registry().kernels)


def choose(request):
    return get_kernel_registry().choose(request)


def examine(kernel, device, **options):
    return get_kernel_registry().examine(kernel, device, **options)


def kept_files(tmp_path):
    return sorted((tmp_path / "kvq" / "verdicts").glob("*"))


@pytest.mark.case("a kernel without a record for this processor", "it is tried once, and is the default where it wins")
def test_a_kernel_that_is_right_and_faster_is_the_default_and_stays_it(
    put, trials, forget, make_request, tmp_path, caplog
):
    put()
    with caplog.at_level("INFO", logger="kvq"):
        assert choose(make_request()).kernel.name == "probe"
    assert choose(make_request()).kernel.name == "probe"
    forget()
    assert choose(make_request()).kernel.name == "probe"
    assert trials == ["probe"]
    (file,) = kept_files(tmp_path)
    found = json.loads(file.read_text(encoding="utf-8"))
    assert (found["over"], found["own_ms"], found["other_ms"]) == ("eager", 1000, 2500)
    assert found["checks"] == len(proving.CHECKS) + 1
    assert found["relative_error"] == 0
    assert found["subject"]["torch"] == torch.__version__
    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert "'probe'" in record.message
    assert "2.5 times as fast as 'eager'" in record.message
    assert "it is the default" in record.message


@pytest.mark.parametrize(("own", "expected"), [(2.4, "probe"), (2.5, "eager"), (4.0, "eager")])
def test_a_kernel_must_be_faster_than_what_runs_otherwise(put, pace, make_request, own, expected, caplog):
    put()
    pace["probe"] = own
    with caplog.at_level("INFO", logger="kvq"):
        choice = choose(make_request())
    assert choice.kernel.name == expected
    assert [one.levelname for one in caplog.records] == ["INFO"]
    if own == 4:
        assert choice.passed_over["probe"].startswith(
            "slower here than 'eager', 4000.00 against 2500.00 ms a step, right within"
        )


WRONG = {
    "everything": lambda request: True,
    "bfloat16": lambda request: request.query.dtype == torch.bfloat16,
    "float16": lambda request: request.query.dtype == torch.float16,
    "sides of two dtypes": lambda request: request.pair.key.like.dtype != request.pair.value.like.dtype,
    "keys per token": lambda request: not request.pair.key.store.codec.per_channel,
    "values per channel": lambda request: request.pair.value.store.codec.per_channel,
    "rotation": lambda request: request.pair.key.store.codec.rotation is not None,
    "balance of keys": lambda request: request.pair.key.store.codec.packed_format.has_factor,
    "balance of values": lambda request: request.pair.value.store.codec.packed_format.has_factor,
    "sinks": lambda request: request.pair.key.sinks.states is not None,
    "a chunk of full length": lambda request: request.stored_length >= 2048,
    "a chunk with room": lambda request: any(one.used < one.capacity for one in request.pair.key.store.segments),
    "a boolean mask": lambda request: request.mask is not None and request.mask.dtype == torch.bool,
    "an additive mask": lambda request: request.mask is not None and request.mask.dtype != torch.bool,
    "several queries": lambda request: request.query.shape[2] > 1,
    "reordered rows": lambda request: request.is_reordered,
    "a cap": lambda request: request.softcap is not None,
    "logits": lambda request: request.sink_logits is not None,
    "float32 metadata": lambda request: request.pair.key.store.codec.spec.metadata_dtype == torch.float32,
    "head dim 80": lambda request: request.query.shape[3] == 80,
    **{
        f"{bits} bit": lambda request, bits=bits: bits in (
            request.pair.key.store.codec.bits, request.pair.value.store.codec.bits
        )
        for bits in range(1, 9)
    },
}  # fmt: skip


@pytest.mark.case("a kernel that computes something else on this processor", "it is refused with a warning")
@pytest.mark.parametrize("kind", WRONG)
def test_a_kernel_that_is_wrong_is_refused(put, trials, forget, make_request, reference, error_of, kind, caplog):
    probe = put(WRONG[kind])
    request, kernel_cache = make_request(), KernelCache()
    with caplog.at_level("INFO", logger="kvq"):
        assert error_of(attend_packed(request, kernel_cache), reference(request)) < 1e-5
    assert kernel_cache.last_reader == "eager"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "differs from the reference by" in record.message
    reason = kernel_cache.passed_over["probe"]
    assert reason.startswith("found wrong here: it differs from the reference by")
    forget()
    asked = len(probe.asked)
    assert choose(make_request()).passed_over == {"probe": reason}
    assert (trials, len(probe.asked)) == (["probe"], asked)


def test_the_report_of_a_cache_has_the_reason(put, make_request):
    put(WRONG["bfloat16"])
    request = make_request()
    attend_packed(request, request.pair.kernel_cache)
    report = report_memory([make_request.layer])
    assert report.attention == ("eager",)
    assert "in bfloat16 (at most 3e-02 is accepted)" in report.passed_over["probe"]
    assert hash(report.layers[0]) == hash(report.layers[0])


def test_what_a_kernel_raises_holds_for_the_process_only(put, trials, forget, make_request, tmp_path):
    def fail(request):
        raise ZeroDivisionError("of all things")

    put(fail)
    for _ in range(2):
        assert choose(make_request()).passed_over["probe"] == (
            "found wrong here: it raised ZeroDivisionError: of all things"
        )
    assert trials == ["probe"]
    assert kept_files(tmp_path) == []
    forget()
    choose(make_request())
    assert trials == ["probe", "probe"]


def test_where_no_thread_can_be_had_nothing_is_found(put, make_request, monkeypatch, tmp_path):
    put()

    def fail(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(proving.threading.Thread, "start", fail)
    assert "could not be tried here: can't start new thread" in choose(make_request()).passed_over["probe"]
    assert kept_files(tmp_path) == []


@pytest.mark.parametrize("text", ["off", "OFF", "0", "false", "no"])
def test_trials_can_be_switched_off(put, trials, make_request, monkeypatch, text):
    put()
    assert choose(make_request()).kernel.name == "probe"
    monkeypatch.setenv("KVQ_KERNEL_TRIALS", text)
    assert choose(make_request()).passed_over["probe"].startswith("no record proves it on cpu-")
    monkeypatch.setenv("KVQ_ATTENTION_KERNEL", "probe")
    assert choose(make_request()).kernel.name == "probe"
    assert trials == ["probe"]


def test_a_variable_that_says_neither_is_refused(put, make_request, monkeypatch):
    put()
    monkeypatch.setenv("KVQ_KERNEL_TRIALS", "perhaps")
    with pytest.raises(ConfigError, match="KVQ_KERNEL_TRIALS: 'perhaps' is neither on nor off"):
        choose(make_request())


@pytest.mark.case("KVQ_ATTENTION_KERNEL= in a shell", "it counts as not set")
@pytest.mark.parametrize("blank", ["", "  ", "\t"])
def test_an_empty_variable_is_not_set(put, make_request, monkeypatch, blank):
    put()
    for name in ("KVQ_ATTENTION_KERNEL", "KVQ_KERNEL_TRIALS"):
        monkeypatch.setenv(name, blank)
    assert choose(make_request()).kernel.name == "probe"
    monkeypatch.setenv("KVQ_ATTENTION_KERNEL", " eager ")
    assert choose(make_request()).kernel.name == "eager"


def test_a_kernel_that_is_named_or_not_reached_is_not_tried(put, trials, make_request, monkeypatch):
    put()
    for name in ("probe", "eager"):
        monkeypatch.setenv("KVQ_ATTENTION_KERNEL", name)
        assert choose(make_request()).kernel.name == name
    monkeypatch.delenv("KVQ_ATTENTION_KERNEL")
    monkeypatch.setattr(Probe, "why_unsupported", lambda self, request: "no such request")
    assert choose(make_request()).passed_over == {"probe": "no such request"}
    monkeypatch.setattr(Probe, "why_unsupported", lambda self, request: None)
    monkeypatch.setattr(Probe, "why_unavailable", lambda self: "no compiler")
    assert choose(make_request()).passed_over == {"probe": "no compiler"}
    registry = get_kernel_registry()
    assert registry.why_not_default(registry.kernels[0], torch.device("meta")) == "runs on cpu, cuda only"
    assert trials == []


def test_a_record_saves_the_trial_and_a_trial_outranks_it(put, trials, give_records, make_request, forget):
    probe = put(WRONG["sinks"])
    give_records("probe")
    assert choose(make_request()).kernel.name == "probe"
    assert examine(probe, CPU).origin == "shipped record"
    assert trials == []
    found = examine(probe, CPU, must_try=True)
    assert (found.origin, trials) == ("measured here", ["probe"])
    forget()
    assert choose(make_request()).kernel.name == "eager"


def test_a_look_is_no_trial(put, trials):
    probe = put()
    found = examine(probe, CPU)
    assert (found.origin, trials) == ("none", [])
    assert found.reason.startswith("not tried on this machine yet")
    assert examine(REFERENCE, CPU) is None


DAMAGES = {
    "empty": lambda text: "",
    "cut off": lambda text: text[: len(text) // 2],
    "zeros": lambda text: "\0" * len(text),
    "no JSON": lambda text: "garbage",
    "no object": lambda text: "[]",
    "of another kernel": lambda text: text.replace('"probe"', '"robe"'),
    "of another version": lambda text: text.replace(torch.__version__, "1.0"),
    "a field more": lambda text: text.replace("{", '{"more": 1,', 1),
    "a field less": lambda text: text.replace('"made_at"', '"when"'),
    "of another type": lambda text: text.replace('"checks": 11,', '"checks": "11",'),
    "no number": lambda text: text.replace('"own_ms": 1000.0', '"own_ms": "NaN"'),
    "no UTF-8": lambda text: "\udcff",
    "a time that is infinite": lambda text: text.replace('"other_ms": 2500.0', '"other_ms": 1e999'),
    "a time that is no number": lambda text: text.replace('"own_ms": 1000.0', '"own_ms": NaN'),
    "a time of nothing": lambda text: text.replace('"own_ms": 1000.0', '"own_ms": 0.0'),
    "two negative times": lambda text: text.replace('_ms": ', '_ms": -'),
    "a negative error": lambda text: text.replace('"relative_error": 0.0', '"relative_error": -1.0'),
    "a negative count": lambda text: text.replace('"checks": 11', '"checks": -9'),
    "too long": lambda text: text + " " * 2**20,
}


@pytest.mark.case("a damaged or foreign file of a verdict", "it is ignored, and written again")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_cannot_be_trusted_is_rewritten(put, trials, forget, make_request, tmp_path, damage):
    put()
    choose(make_request())
    (file,) = kept_files(tmp_path)
    whole = file.read_text(encoding="utf-8")
    file.write_text(DAMAGES[damage](whole), encoding="utf-8", errors="surrogateescape")
    forget()
    assert choose(make_request()).kernel.name == "probe"
    assert trials == ["probe", "probe"]
    assert kept_files(tmp_path) == [file]
    assert json.loads(file.read_text(encoding="utf-8"))["subject"] == json.loads(whole)["subject"]


def test_a_file_that_others_may_write_to_is_not_believed(put, trials, forget, make_request, tmp_path):
    put()
    choose(make_request())
    kept_files(tmp_path)[0].chmod(0o666)
    forget()
    choose(make_request())
    assert len(trials) == 2


@pytest.mark.case("a verdict's file of 4 TiB", "it is not read, and written again")
def test_a_file_longer_than_memory_is_rewritten(put, trials, forget, make_request, tmp_path):
    put()
    choose(make_request())
    (file,) = kept_files(tmp_path)
    make_sparse(file)
    forget()
    assert choose(make_request()).kernel.name == "probe"
    assert (trials, file.stat().st_size < 2**12) == (["probe"] * 2, True)


def make_sparse(file):
    try:
        os.truncate(file, 2**42)
    except OSError:
        pytest.skip("the file system takes no file of this length")


@pytest.mark.case("a kernel that passed, and raises when it is tried again", "its files are deleted")
@pytest.mark.parametrize("trouble", ["it raises", "it is wrong and nothing can be written"])
def test_a_verdict_that_is_in_doubt_does_not_stay(put, forget, make_request, monkeypatch, tmp_path, trouble):
    probe = put()
    choose(make_request())
    assert len(kept_files(tmp_path)) == 1

    def fail(*args):
        raise OSError(28, "No space left on device")

    if trouble == "it raises":
        probe.is_wrong = lambda request: 1 / 0
    else:
        probe.is_wrong = lambda request: True
        monkeypatch.setattr(verdicts, "keep_file", fail)
    assert examine(probe, CPU, must_try=True).reason.startswith("found wrong here")
    assert kept_files(tmp_path) == []


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("8 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.case("a trial while memory is short", "nothing is found, and the kernel is tried again later")
def test_a_lack_of_memory_says_nothing_of_a_kernel(put, trials, make_request, tmp_path, error):
    def fail(request):
        raise error

    probe = put(fail)
    assert choose(make_request()).passed_over["probe"].startswith("could not be tried here: not enough memory: ")
    probe.is_wrong = lambda request: False
    assert choose(make_request()).kernel.name == "probe"
    (file,) = kept_files(tmp_path)
    probe.is_wrong = fail
    assert examine(probe, CPU, must_try=True).reason.startswith("could not be tried here")
    assert choose(make_request()).kernel.name == "probe", "what was known before still holds"
    assert (trials, kept_files(tmp_path)) == (["probe"] * 3, [file])


def test_what_a_kernel_raises_is_one_line_of_limited_length(put, make_request, caplog):
    def fail(request):
        raise ValueError("a line\n" * 10_000)

    put(fail)
    reason = choose(make_request()).passed_over["probe"]
    assert reason.startswith("found wrong here: it raised ValueError: a line a line")
    (record,) = caplog.records
    for text in (reason, record.message):
        assert "\n" not in text
        assert len(text) < 600


def test_what_cannot_be_written_as_json_is_not_kept(put, trials, make_request, monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise ValueError("Out of range float values are not JSON compliant")

    put()
    monkeypatch.setattr(verdicts.json, "dumps", refuse)
    assert choose(make_request()).kernel.name == "probe"
    assert (trials, kept_files(tmp_path)) == (["probe"], [])


@pytest.mark.case("Ctrl-C during a trial", "the trial ends with the step in hand, too")
def test_an_interrupt_ends_the_trial(put, make_request, monkeypatch):
    go_on, threads, join = threading.Event(), [], threading.Thread.join

    def wait(request):
        go_on.wait(60)
        return False

    def interrupt(thread, timeout=None):
        threads.append(thread)
        raise KeyboardInterrupt

    probe = put(wait)
    with monkeypatch.context() as interrupted:
        interrupted.setattr(proving.threading.Thread, "join", interrupt)
        with pytest.raises(KeyboardInterrupt):
            choose(make_request())
    go_on.set()
    join(threads[0], 60)
    assert not threads[0].is_alive()
    assert len(probe.asked) <= 1, "the step in hand, and none behind it"


def test_another_code_machine_or_version_is_tried_again(put, trials, make_request, monkeypatch):
    probe = put()
    changes = [
        lambda: setattr(probe, "source", "second"),
        lambda: monkeypatch.setattr(verdicts, "describe_processor", lambda: "another"),
        lambda: monkeypatch.setattr(verdicts, "device_class", lambda device: "cpu-z80"),
        lambda: monkeypatch.setattr(verdicts.torch, "__version__", "9.9"),
        lambda: monkeypatch.setattr(verdicts.torch.backends.cpu, "get_cpu_capability", lambda: "NONE"),
        lambda: monkeypatch.setattr(verdicts.torch, "get_num_threads", lambda: 77),
    ]
    choose(make_request())
    for number, change in enumerate(changes):
        change()
        for _ in range(2):
            choose(make_request())
        assert len(trials) == 2 + number


def test_where_nothing_can_be_kept_a_trial_holds_for_the_process(put, trials, make_request, tmp_path, caplog):
    (tmp_path / "kvq").write_text("", encoding="utf-8")
    probe = put()
    for _ in range(3):
        assert choose(make_request()).kernel.name == "probe"
    probe.source = "second"
    choose(make_request())
    assert trials == ["probe", "probe"]
    (record,) = [one for one in caplog.records if one.levelname == "WARNING"]
    assert "holds for this process only" in record.message


def test_threads_that_come_at_once_wait_for_one_trial(put, trials, make_request):
    put()
    names = []
    threads = [threading.Thread(target=lambda: names.append(choose(make_request()).kernel.name)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (names, trials) == (["probe"] * 4, ["probe"])


def test_processes_that_write_at_once_leave_a_whole_file(put, make_request, tmp_path):
    """As threads, each with a file of its own until it is renamed."""
    probe = put()
    choose(make_request())
    subject = verdicts.make_subject(probe, CPU)
    verdict = verdicts.find_kept(subject)
    found = []

    def write_and_read():
        for _ in range(30):
            verdicts.keep(verdict)
            found.append(verdicts.find_kept(subject))

    threads = [threading.Thread(target=write_and_read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [verdict] * 120
    assert len(kept_files(tmp_path)) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_process_forked_during_a_trial_does_not_wait_for_it():
    with standing._LOCK:
        child = os.fork()
        if not child:
            os._exit(0 if standing._LOCK.acquire(timeout=10) else 1)
        assert os.waitpid(child, 0)[1] == 0


class Seen(TorchDispatchMode):
    """Notes whether it saw any operation."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


STATES = {
    "nothing": [],
    "no_grad": [torch.no_grad],
    "inference_mode": [torch.inference_mode],
    "autocast": [lambda: torch.autocast("cpu", torch.bfloat16)],
    "another default device": [lambda: torch.device("meta")],
    "all": [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16), lambda: torch.device("meta")],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state", STATES)
def test_a_trial_neither_feels_nor_changes_what_the_caller_has_set(put, make_request, monkeypatch, state, dtype):
    if dtype == torch.float64 and Version(torch.__version__) < Version("2.7"):
        pytest.skip("torch.ldexp of 2.6 computes in the default dtype, in the reference as well")
    probe, request = put(), make_request()
    before = torch.get_default_dtype(), torch.get_num_threads()
    torch.manual_seed(5)
    with ExitStack() as stack:
        for enter in STATES[state]:
            stack.enter_context(enter())
        torch.set_default_dtype(dtype)
        try:
            facts = list_facts()
            with Seen() as seen:
                choice = choose(request)
            assert list_facts() == facts
        finally:
            torch.set_default_dtype(before[0])
    assert choice.kernel.name == "probe", choice.passed_over
    assert seen.count == 0
    assert torch.get_num_threads() == before[1]
    assert torch.initial_seed() == 5
    assert torch.rand(3).tolist() == torch.rand(3, generator=torch.Generator().manual_seed(5)).tolist()
    assert not any(one.query.is_inference() or one.query.requires_grad for one in probe.asked)


def list_facts():
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.empty(0).device,
        torch.get_rng_state().tolist() if torch.empty(0).device.type == "cpu" else None,
    )


def test_nothing_is_tried_while_a_model_is_traced(put, trials, make_request, monkeypatch):
    put()
    with monkeypatch.context() as tracing:
        tracing.setattr(torch.compiler, "is_compiling", lambda: True)
        assert choose(make_request()).passed_over["probe"].startswith("not tried on this machine yet")
    assert trials == []
    assert choose(make_request()).kernel.name == "probe"


class Watch:
    """A clock that stands still, but for the seconds that each step of a kernel takes."""

    def __init__(self, monkeypatch, seconds):
        self.now, self.begun = 0.0, []

        def take(step, device):
            self.begun.append(self.now)
            step()
            self.now += seconds[step.args[1].name]
            return seconds[step.args[1].name]

        monkeypatch.setattr(proving, "BUDGET_SECONDS", 2.0)
        monkeypatch.setattr(proving, "take_seconds", take)

    def __call__(self):
        return self.now


@pytest.mark.case("a machine on which a step of the reference takes seconds", "the trial ends with the step in hand")
@pytest.mark.parametrize(
    ("own", "other", "checks", "steps"),
    [
        (0.0, 0.0, 11, 2 * (11 + 15)),
        (0.02, 0.1, 6, 2 * 16),  # six comparisons of 0.12 s end at 0.72 s, one more at 0.84; ten rounds end at 1.92
        (0.1, 0.4, 2, 2 * 3),  # the length of a check is known after one; a third would end at 1.5 s
        (0.1, 1.6, 1, 2),
        (0.1, 2.0, 1, 2),
        (0.1, 30.0, 1, 2),
    ],
)
def test_a_clock_bounds_the_trial(put, monkeypatch, own, other, checks, steps):
    watch, probe = Watch(monkeypatch, {"probe": own, "eager": other}), put()
    subject = verdicts.make_subject(probe, CPU)
    verdict, is_lasting = proving.prove(probe, [REFERENCE], subject, CPU, clock=watch)
    assert (verdict.checks, len(watch.begun)) == (checks, steps)
    assert max(watch.begun) <= 2, "no step begins behind the end"
    assert watch.now <= max(2.0, own + other), "nor one that would not fit, but for the first two"
    assert (verdict.is_passing, verdict.over, is_lasting) == (own < other, "eager", True)


def test_a_sample_depends_on_its_seed_alone_and_every_code_occurs():
    first, again, other = (Sample(bits=(3, 2)).build(CPU, seed) for seed in (1, 1, 2))
    assert first.pair.key.materialize().equal(again.pair.key.materialize())
    assert not first.pair.key.materialize().equal(other.pair.key.materialize())
    store = first.pair.key.store
    codes = read_levels(get_packed_format(store.codec), store.segments[0].parts, store.codec.constants())
    assert set(codes.flatten().tolist()) == set(range(-4, 4))
    assert first.pair.key.materialize().std() > 0.3


class FakeCuda:
    """Stands for the device: what is asked of it, in order."""

    def __init__(self, monkeypatch, is_capturing=False):
        self.calls = []
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Fake H100")
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_capturing)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: self.calls.append("wait"))
        monkeypatch.setattr(torch.cuda, "device", self.enter)
        build = Sample.build
        monkeypatch.setattr(Sample, "build", lambda sample, device, seed=0: build(sample, CPU, seed))

    def enter(self, device):
        self.calls.append(str(device))
        return torch.no_grad()


def test_a_kernel_for_a_gpu_takes_the_same_road(put_kernels, monkeypatch, trials, tmp_path):
    """No GPU: the device is a fake, and the requests of the trial lie on the processor."""
    cuda, device = FakeCuda(monkeypatch), torch.device("cuda", 0)
    probe = Probe()
    put_kernels(probe, REFERENCE)
    attend = Probe.attend
    monkeypatch.setattr(Probe, "attend", lambda self, request: cuda.calls.append("step") or attend(self, request))
    get_kernel_registry().why_not_default(probe, device, may_try=True)
    assert trials == ["probe"]
    assert cuda.calls[0] == "cuda:0"
    timed = cuda.calls[1 + cuda.calls.index("wait") - 1 :]
    assert timed[:6] == ["wait", "step", "wait", "wait", "wait", "wait"], "before and behind each step, of both kernels"
    (file,) = kept_files(tmp_path)
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["subject"]["device_class"] == "cuda-sm90"
    assert found["device_name"] == "Fake H100"


def test_nothing_is_tried_while_a_graph_is_recorded(monkeypatch, trials):
    FakeCuda(monkeypatch, is_capturing=True)
    reason = get_kernel_registry().why_not_default(Probe(), torch.device("cuda", 0), may_try=True)
    assert reason.startswith("not tried on this machine yet")
    assert trials == []


GENERATE = """
import json, torch, transformers
from kvq import attach
torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=199, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, initializer_range=0.2)
model = transformers.AutoModelForCausalLM.from_config(config).eval()
with attach(model, nbits_k=4, nbits_v=4) as handle:
    model.generate(torch.arange(2, 190)[None].repeat(1, 2), max_new_tokens=20, do_sample=False, pad_token_id=0)
    report = handle.cache.memory()
    print(json.dumps([report.attention, report.passed_over]))
"""


@pytest.mark.slow
@pytest.mark.costly
@pytest.mark.skipif(library.why_unavailable() is not None, reason="no C compiler")
def test_attach_tries_the_compiled_kernel_by_itself(tmp_path):
    """Which kernel wins is the machine's affair; that what it says is obeyed is ours."""
    kernels = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvq" / "kernels"
    shutil.copytree(kernels, tmp_path / "kvq" / "kernels")
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "KVQ_KERNEL_TRIALS": ""}
    command = [sys.executable, "-W", "ignore", "-c", GENERATE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    readers, passed_over = json.loads(done.stdout)
    (file,) = kept_files(tmp_path)
    verdict = verdicts.Verdict.model_validate_json(file.read_bytes())
    assert verdict.fault is None
    assert readers == (["compiled"] if verdict.is_passing else ["eager"])
    assert ("compiled" in passed_over) is not verdict.is_passing
