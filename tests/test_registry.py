"""Discovery and loading of backends, over real distributions in a temporary directory."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import re
import sys
import textwrap
import threading
import weakref
from importlib import metadata

import pytest
from pydantic import ConfigDict

from kvq.errors import (
    BackendConflictError,
    BackendError,
    BlockedBackendError,
    BrokenBackendError,
    MissingRequirementError,
    UnknownBackendError,
)
from kvq.plugin_api import API_VERSION, BackendOptions, BackendSpec, Capabilities, Granularity
from kvq.registry import BackendRegistry, available_backends, get_registry, register_backend
from kvq.registry.discovery import ENTRY_POINT_GROUP

PLUGIN = """
from kvq.plugin_api import API_VERSION, BackendSpec, Capabilities, hookimpl

@hookimpl
def kvq_backend():
    return BackendSpec(
        name={name!r}, api_version=API_VERSION, capabilities=Capabilities(nbits=(4,)), build=lambda spec, options: None
    )
"""


class Site:
    """A directory of installed distributions, and registries that see nothing else."""

    def __init__(self, path):
        self.path = path
        self.finder_calls = 0

    def add_distribution(self, title: str, entry_points: dict[str, str], **fields: str) -> None:
        """Add "name version" with entry points `{backend: module}`."""
        name, version = title.split()
        folder = self.path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        lines = [f"{key}: {value}" for key, value in {"Name": name, "Version": version, **fields}.items() if value]
        (folder / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", *lines, ""]))
        listed = "".join(f"{backend} = {module}\n" for backend, module in entry_points.items())
        (folder / "entry_points.txt").write_text(f"[{ENTRY_POINT_GROUP}]\n{listed}\n[console_scripts]\nx = y:z\n")

    def add_module(self, name: str, source: str) -> None:
        (self.path / f"{name}.py").write_text(textwrap.dedent(source))
        importlib.invalidate_caches()

    def add_backend(self, name: str, title: str | None = None, source: str | None = None) -> None:
        """Add a distribution with one module that offers one backend."""
        title = title or f"kvq-{name} 1.0"
        module = f"site_{title.split()[0]}_{name}".replace("-", "_")
        self.add_distribution(title, {name: module})
        self.add_module(module, PLUGIN.format(name=name) if source is None else source)

    def find(self):
        self.finder_calls += 1
        found = metadata.distributions(path=[str(self.path)])
        return [point for dist in found for point in dist.entry_points.select(group=ENTRY_POINT_GROUP)]

    def registry(self, **environment: str) -> BackendRegistry:
        return BackendRegistry(self.find, environment)


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    yield Site(tmp_path)
    for name in [name for name in sys.modules if name.startswith("site_")]:
        del sys.modules[name]


@pytest.fixture
def spec():
    return make_spec()


def make_spec(**changes):
    fields = {
        "name": "coded",
        "api_version": API_VERSION,
        "capabilities": Capabilities(nbits=(4,)),
        "build": lambda _spec, _options: None,
    }
    return BackendSpec(**{**fields, **changes})


def info_of(registry, name, *, load=False):
    return next(info for info in registry.available_backends(load=load) if info.name == name)


def site_modules():
    return [name for name in sys.modules if name.startswith("site_")]


class TestNames:
    def test_listing_names_imports_nothing(self, site):
        site.add_backend("fine")
        site.add_backend("explosive", source="raise SystemExit('imported')")
        infos = site.registry().available_backends()
        assert [(info.name, info.origin, info.version, info.state, info.spec) for info in infos] == [
            ("explosive", "kvq-explosive", "1.0", "available", None),
            ("fine", "kvq-fine", "1.0", "available", None),
        ]
        assert site_modules() == []

    def test_only_the_plugin_that_is_named_is_imported(self, site):
        site.add_backend("fine")
        site.add_backend("other")
        spec = site.registry().get_backend("fine")
        assert spec.name == "fine"
        assert site_modules() == ["site_kvq_fine_fine"]

    def test_metadata_is_read_once_and_late(self, site):
        registry = site.registry()
        assert site.finder_calls == 0
        site.add_backend("fine")
        for _ in range(2):
            registry.get_backend("fine")
            registry.available_backends()
        assert site.finder_calls == 1

    def test_a_backend_is_loaded_once(self, site):
        site.add_backend("fine")
        registry = site.registry()
        assert registry.get_backend("fine") is registry.get_backend("fine")

    def test_once_loaded_a_backend_is_ready_and_shows_its_spec(self, site):
        site.add_backend("fine")
        registry = site.registry()
        spec = registry.get_backend("fine")
        info = info_of(registry, "fine")
        assert (info.state, info.spec, info.reason) == ("ready", spec, "")

    def test_the_entry_points_of_the_environment_are_found_by_default(self, site):
        site.add_backend("fine")
        names = {info.name for info in BackendRegistry().available_backends()}
        assert "fine" in names

    def test_one_distribution_found_twice_is_one(self, site):
        site.add_backend("fine")
        registry = BackendRegistry(lambda: [*site.find(), *site.find()], {})
        assert registry.get_backend("fine").name == "fine"


class TestUnknown:
    def test_the_message_has_a_guess_and_all_names(self, site, spec):
        site.add_distribution("kvq 1.0", {"alpha": "site_alpha"})
        registry = site.registry()
        registry.register_backend(spec)
        with pytest.raises(UnknownBackendError) as caught:
            registry.get_backend("alhpa")
        assert str(caught.value) == (
            "backend 'alhpa' is unknown; did you mean 'alpha'? known: 'alpha', 'coded'; "
            "install a plugin that offers it, or call register_backend"
        )

    def test_a_bare_checkout_says_how_to_install_it(self, site):
        with pytest.raises(UnknownBackendError, match=r"known: none; .*run `pip install -e .` in the checkout"):
            site.registry().get_backend("alpha")
        site.add_backend("theirs")
        with pytest.raises(UnknownBackendError, match=r"known: 'theirs'; .*pip install -e \."):
            site.registry().get_backend("alpha")

    def test_a_name_is_not_unknown_for_good(self, site, spec):
        registry = site.registry()
        with pytest.raises(UnknownBackendError):
            registry.get_backend("coded")
        registry.register_backend(spec)
        assert registry.get_backend("coded") is spec


class TestLists:
    @pytest.mark.parametrize(
        ("environment", "blocked"),
        [
            ({}, set()),
            ({"KVQ_PLUGINS": "one, two"}, {"three"}),
            ({"KVQ_PLUGINS": ""}, set()),
            ({"KVQ_PLUGINS": "  "}, set()),
            ({"KVQ_PLUGINS": ","}, {"one", "two", "three"}),
            ({"KVQ_BLOCK_PLUGINS": "one,,absent,"}, {"one"}),
            ({"KVQ_BLOCK_PLUGINS": ""}, set()),
            ({"KVQ_PLUGINS": "one,two", "KVQ_BLOCK_PLUGINS": "two"}, {"two", "three"}),
        ],
    )
    def test_what_is_blocked(self, site, environment, blocked):
        for name in ("one", "two", "three"):
            site.add_backend(name)
        registry = site.registry(**environment)
        assert {info.name for info in registry.available_backends() if info.state == "blocked"} == blocked
        for name in ("one", "two", "three"):
            if name in blocked:
                with pytest.raises(BlockedBackendError, match=f"backend '{name}' is blocked"):
                    registry.get_backend(name)
            else:
                assert registry.get_backend(name).name == name

    def test_the_message_names_the_variable_and_the_remedy(self, site):
        site.add_backend("one")
        with pytest.raises(BlockedBackendError, match="by KVQ_BLOCK_PLUGINS; take it out of that list"):
            site.registry(KVQ_BLOCK_PLUGINS="one").get_backend("one")
        with pytest.raises(BlockedBackendError, match="KVQ_PLUGINS does not list it; add it there"):
            site.registry(KVQ_PLUGINS="two").get_backend("one")
        assert site_modules() == []

    def test_a_name_that_nobody_offers_is_unknown_not_blocked(self, site):
        with pytest.raises(UnknownBackendError):
            site.registry(KVQ_PLUGINS=",", KVQ_BLOCK_PLUGINS="absent").get_backend("absent")

    def test_a_blocked_conflict_is_blocked(self, site):
        site.add_backend("one", "dist-a 1.0")
        site.add_backend("one", "dist-b 1.0")
        with pytest.raises(BlockedBackendError):
            site.registry(KVQ_BLOCK_PLUGINS="one").get_backend("one")

    def test_the_lists_hold_for_what_is_loaded_already(self, site):
        site.add_backend("one")
        environment: dict[str, str] = {}
        registry = BackendRegistry(site.find, environment)
        registry.get_backend("one")
        environment["KVQ_BLOCK_PLUGINS"] = "one"
        with pytest.raises(BlockedBackendError):
            registry.get_backend("one")
        assert info_of(registry, "one", load=True).state == "blocked"

    def test_what_is_registered_from_code_is_no_plugin(self, site, spec):
        registry = site.registry(KVQ_PLUGINS=",", KVQ_BLOCK_PLUGINS="coded")
        registry.register_backend(spec)
        assert registry.get_backend("coded") is spec


class TestConflicts:
    def test_every_distribution_is_named_with_its_version(self, site):
        for title in ("dist-a 1.0", "dist-b 2.5", "dist-c 0.1"):
            site.add_backend("fast", title)
        site.add_backend("fine")
        registry = site.registry()
        with pytest.raises(BackendConflictError) as caught:
            registry.get_backend("fast")
        assert all(title in str(caught.value) for title in ("dist-a 1.0", "dist-b 2.5", "dist-c 0.1"))
        assert "uninstall all but one" in str(caught.value)
        assert site_modules() == []
        for load in (False, True):
            assert info_of(registry, "fast", load=load).state == "conflict"
        assert registry.get_backend("fine").name == "fine"

    def test_two_claims_of_one_distribution_are_a_conflict(self, site):
        folder = "dist_a-1.0.dist-info/entry_points.txt"
        site.add_distribution("dist-a 1.0", {"fast": "site_one"})
        text = (site.path / folder).read_text()
        (site.path / folder).write_text(text.replace("fast = site_one", "fast = site_one\nfast = site_two"))
        with pytest.raises(BackendConflictError, match=r"site_one.*site_two"):
            site.registry().get_backend("fast")

    @pytest.mark.parametrize("own_name", ["kvq", "KVQ"])
    def test_our_own_names_are_reserved(self, site, own_name):
        site.add_backend("ours", "a-foreign 9.0", source="raise ValueError('foreign')")
        site.add_backend("ours", f"{own_name} 1.0")
        site.add_backend("ours", "z-foreign 9.1", source="raise ValueError('foreign')")
        registry = site.registry()
        assert registry.get_backend("ours").name == "ours"
        for load in (False, True):
            info = info_of(registry, "ours", load=load)
            assert (info.origin, info.version, info.state) == (own_name, "1.0", "ready")
            assert re.search(r"reserved; ignored: a-foreign 9\.0 .*and z-foreign 9\.1", info.reason)

    def test_a_distribution_named_alike_is_foreign(self, site):
        site.add_backend("ours", "kvq-plus 1.0")
        site.add_backend("ours", "kvq 1.0")
        assert "kvq-plus 1.0" in info_of(site.registry(), "ours").reason


BROKEN = {
    "import error": ("import site_absent_library", "ModuleNotFoundError: No module named 'site_absent_library'"),
    "syntax error": ("def", "SyntaxError"),
    "exit at import": ("import sys; sys.exit('bye')", "SystemExit: bye"),
    "panic at import": ("class Panic(BaseException): pass\nraise Panic('native')", "Panic: native"),
    "no hook": ("def kvq_backend(): pass", "no function kvq_backend marked with @hookimpl"),
    "hook of another name": (
        "from kvq.plugin_api import hookimpl\n@hookimpl\ndef kvq_backends(): pass",
        "no function kvq_backend marked with @hookimpl",
    ),
    "hook with arguments": (
        "from kvq.plugin_api import hookimpl\n@hookimpl\ndef kvq_backend(name): pass",
        "PluginValidationError",
    ),
    "hook raises": (
        "from kvq.plugin_api import hookimpl\n@hookimpl\ndef kvq_backend(): raise RuntimeError('no GPU')",
        "RuntimeError: no GPU",
    ),
    "hook exits": (
        "from kvq.plugin_api import hookimpl\n@hookimpl\ndef kvq_backend(): raise SystemExit(3)",
        "SystemExit: 3",
    ),
    "hook returns None": (
        "from kvq.plugin_api import hookimpl\n@hookimpl\ndef kvq_backend(): return None",
        "a BackendSpec is needed, got NoneType",
    ),
    "hook returns a dict": (
        "from kvq.plugin_api import hookimpl\n@hookimpl\ndef kvq_backend(): return {'name': 'bad'}",
        "a BackendSpec is needed, got dict",
    ),
    "misnamed": (PLUGIN.format(name="good"), "it calls itself 'good'"),
    "other API": (PLUGIN.format(name="bad").replace("=API_VERSION", "=99"), "plugin API 99, this kvq has 1"),
    "bad requirement": (
        PLUGIN.format(name="bad").replace("name='bad'", "requires=('a ~~ 1',), name='bad'"),
        "requirement 'a ~~ 1' cannot be parsed",
    ),
}


class TestBrokenPlugins:
    @pytest.mark.parametrize(("source", "reason"), BROKEN.values(), ids=BROKEN)
    def test_one_stays_local_visible_and_late(self, site, source, reason):
        site.add_backend("bad", "kvq-bad 3.1", source=source)
        site.add_backend("fine")
        registry = site.registry()
        assert info_of(registry, "bad").state == "available"
        infos = {info.name: info for info in registry.available_backends(load=True)}
        assert (infos["bad"].state, infos["fine"].state) == ("broken", "ready")
        assert reason in infos["bad"].reason
        assert info_of(registry, "bad").state == "broken"
        with pytest.raises(BrokenBackendError, match=re.escape(reason)) as caught:
            registry.get_backend("bad")
        assert "backend 'bad' from kvq-bad 3.1 (site_kvq_bad_bad)" in str(caught.value)
        assert registry.get_backend("fine").name == "fine"

    def test_the_first_error_has_its_cause(self, site):
        site.add_backend("bad", source="raise OSError('no library')")
        with pytest.raises(BrokenBackendError) as caught:
            site.registry().get_backend("bad")
        assert isinstance(caught.value.__cause__, OSError)

    def test_each_error_is_a_fresh_one(self, site):
        site.add_backend("bad", source="raise OSError('no library')")
        registry = site.registry()
        errors = []
        for _ in range(3):
            with pytest.raises(BrokenBackendError) as caught:
                registry.get_backend("bad")
            errors.append(caught.value)
        assert len({id(error) for error in errors}) == 3
        assert len({str(error) for error in errors}) == 1

        def depth(error):
            traceback, count = error.__traceback__, 0
            while traceback is not None:
                traceback, count = traceback.tb_next, count + 1
            return count

        assert depth(errors[1]) == depth(errors[2])

    def test_a_kept_failure_keeps_no_frames_of_the_caller_alive(self, site):
        site.add_backend("bad", source="raise OSError('no library')")
        registry = site.registry()

        class Model:
            pass

        def build_cache():
            model = Model()
            try:
                registry.get_backend("bad")
            except BrokenBackendError:
                return weakref.ref(model)

        reference = build_cache()
        gc.collect()
        assert reference() is None

    def test_a_failed_plugin_is_not_imported_again(self, site):
        source = "import builtins\nbuiltins.site_imports = getattr(builtins, 'site_imports', 0) + 1\nraise OSError"
        site.add_backend("bad", source=source)
        registry = site.registry()
        try:
            for _ in range(3):
                with pytest.raises(BrokenBackendError):
                    registry.get_backend("bad")
            assert sys.modules["builtins"].site_imports == 1
        finally:
            del sys.modules["builtins"].site_imports

    def test_an_interrupt_is_the_users_and_leaves_nothing_behind(self, site):
        source = PLUGIN.format(name="fine") + "\nimport builtins\nif builtins.site_interrupt: raise KeyboardInterrupt\n"
        site.add_backend("fine", source=source)
        registry = site.registry()
        builtins = sys.modules["builtins"]
        builtins.site_interrupt = True
        try:
            with pytest.raises(KeyboardInterrupt):
                registry.get_backend("fine")
            builtins.site_interrupt = False
            assert registry.get_backend("fine").name == "fine"
        finally:
            del builtins.site_interrupt

    def test_one_plugin_is_never_asked_for_another(self, site):
        for name in ("first", "second"):
            counted = PLUGIN.format(name=name).replace("    return", "    CALLS.append(1)\n    return")
            site.add_backend(name, source="CALLS = []\n" + counted)
        registry = site.registry()
        for name in ("first", "second"):
            assert registry.get_backend(name).name == name
        calls = [sys.modules[f"site_kvq_{name}_{name}"].CALLS for name in ("first", "second")]
        assert calls == [[1], [1]]

    def test_two_names_of_one_module_leave_the_true_one_working(self, site):
        site.add_distribution("dist 1.0", {"true": "site_shared", "alias": "site_shared"})
        site.add_module("site_shared", PLUGIN.format(name="true"))
        registry = site.registry()
        states = {info.name: info.state for info in registry.available_backends(load=True)}
        assert states == {"alias": "broken", "true": "ready"}

    def test_a_plugin_may_ask_the_registry_while_it_is_imported(self, site, monkeypatch):
        site.add_backend("fine")
        source = "import kvq.registry\nkvq.registry.get_registry().get_backend('fine')\n" + PLUGIN.format(name="nested")
        site.add_backend("nested", source=source)
        registry = site.registry()
        monkeypatch.setattr("kvq.registry.registry._registry", registry)
        assert registry.get_backend("nested").name == "nested"

    def test_threads_load_a_backend_once(self, site):
        source = "import time\ntime.sleep(0.05)\n" + PLUGIN.format(name="slow")
        site.add_backend("slow", source=source)
        registry = site.registry()
        found = []
        threads = [threading.Thread(target=lambda: found.append(registry.get_backend("slow"))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 4
        assert all(spec is found[0] for spec in found)

    def test_damaged_metadata_breaks_nothing(self, site):
        site.add_backend("fine")
        for field in ("Name", "Version"):
            site.add_distribution(f"damaged-{field} 1.0", {f"damaged-{field}": "site_absent"}, **{field: ""})
        (site.path / "bare-1.0.dist-info").mkdir()
        (site.path / "bare-1.0.dist-info" / "entry_points.txt").write_text(
            f"[{ENTRY_POINT_GROUP}]\nbare = site_absent\n"
        )
        states = {info.name: info.state for info in site.registry().available_backends(load=True)}
        assert states == {"bare": "broken", "damaged-Name": "broken", "damaged-Version": "broken", "fine": "ready"}

    def test_an_entry_point_that_names_no_module_is_broken(self, site):
        site.add_distribution("dist 1.0", {"odd": "not a module!"})
        assert info_of(site.registry(), "odd", load=True).state == "broken"


class LooseOptions(BackendOptions):
    model_config = ConfigDict(extra="allow")


class ThawedOptions(BackendOptions):
    model_config = ConfigDict(frozen=False)


def capabilities(**changes):
    return {"capabilities": dataclasses.replace(Capabilities(nbits=(4,)), **changes)}


class TestSpecs:
    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"name": "two words"}, "the name 'two words' is not made of"),
            ({"name": ""}, "the name '' is not made of"),
            ({"name": 4}, "the name 4 is not made of"),
            ({"api_version": 0}, "plugin API 0"),
            ({"api_version": "1"}, "plugin API '1'"),
            ({"options": dict}, "is not a subclass of BackendOptions"),
            ({"options": BackendOptions()}, "is not a subclass of BackendOptions"),
            ({"options": LooseOptions}, "LooseOptions is not frozen or accepts unknown keys"),
            ({"options": ThawedOptions}, "ThawedOptions is not frozen or accepts unknown keys"),
            ({"build": None}, "build=None is not callable"),
            ({"capabilities": (4,)}, "is not a Capabilities"),
            (capabilities(nbits=()), "capabilities.nbits=() is not a tuple of at least one number"),
            (capabilities(nbits=4), "capabilities.nbits=4 is not a tuple"),
            (capabilities(nbits=("4",)), "is not a tuple of at least one number"),
            (capabilities(nbits=(4, 0)), "holds something that is not a number of bits"),
            (capabilities(nbits=(True,)), "holds something that is not a number of bits"),
            (capabilities(nbits=(float("nan"),)), "holds something that is not a number of bits"),
            (capabilities(granularities=()), "at least one Granularity"),
            (capabilities(granularities=("per_token",)), "at least one Granularity"),
            (capabilities(device_types="cpu"), "capabilities.device_types='cpu' is not a tuple of strings"),
            (capabilities(states_dtypes=(1,)), "capabilities.states_dtypes=(1,) is not a tuple of strings"),
            ({"axis_names": {"0": Granularity.PER_TOKEN}}, "does not map integers to Granularity"),
            ({"axis_names": {0: "per_token"}}, "does not map integers to Granularity"),
            ({"axis_names": None}, "does not map integers to Granularity"),
            ({"requires": "torch>=2"}, "requires='torch>=2' is not a tuple of strings"),
            ({"requires": (4,)}, "is not a tuple of strings"),
            ({"requires": ("torch >> 2",)}, "requirement 'torch >> 2' cannot be parsed"),
            ({"summary": None}, "summary=None is not a string"),
        ],
    )
    def test_a_wrong_field_is_refused(self, site, changes, reason):
        registry = site.registry()
        with pytest.raises(BrokenBackendError, match=re.escape(reason)):
            registry.register_backend(make_spec(**changes))
        assert registry.available_backends() == []

    def test_every_fault_is_told(self, site):
        with pytest.raises(BrokenBackendError) as caught:
            site.registry().register_backend(make_spec(build=3, requires="x", url=None))
        assert all(part in str(caught.value) for part in ("build=3", "requires='x'", "url=None"))

    @pytest.mark.parametrize("name", ["coded", "two-words", "two_words", "int4"])
    def test_a_valid_one_is_taken(self, site, name):
        registry = site.registry()
        spec = make_spec(
            name=name,
            requires=("torch>=2; python_version>'3'", "x[y]"),
            capabilities=Capabilities(nbits=(2.5, 4), granularities=(Granularity.PER_TOKEN,), device_types=("cuda",)),
            axis_names={},
        )
        registry.register_backend(spec)
        assert registry.get_backend(name) is spec

    def test_what_is_no_spec_is_refused(self, site):
        with pytest.raises(BrokenBackendError, match="a BackendSpec is needed, got dict"):
            site.registry().register_backend({"name": "coded"})


class TestRegistering:
    def test_a_registered_backend_is_listed_between_the_others(self, site, spec):
        site.add_backend("fine")
        registry = site.registry()
        registry.register_backend(spec)
        infos = registry.available_backends()
        assert [info.name for info in infos] == ["coded", "fine"]
        assert (infos[0].origin, infos[0].state, infos[0].spec) == ("register_backend", "ready", spec)

    def test_a_name_is_replaced_on_request_only(self, site, spec):
        registry = site.registry()
        registry.register_backend(spec)
        registry.register_backend(spec)
        other = make_spec(summary="another")
        with pytest.raises(BackendConflictError, match="pass replace=True"):
            registry.register_backend(other)
        assert registry.get_backend("coded") is spec
        registry.register_backend(other, replace=True)
        assert registry.get_backend("coded") is other

    def test_the_name_of_a_plugin_is_never_replaced(self, site):
        site.add_backend("fine", "kvq-fine 2.0")
        registry = site.registry()
        with pytest.raises(BackendConflictError, match=r"the name belongs to kvq-fine 2\.0"):
            registry.register_backend(make_spec(name="fine"), replace=True)
        assert site_modules() == []
        assert registry.get_backend("fine").build is not make_spec().build

    def test_the_functions_of_the_module_use_the_registry_of_the_process(self, monkeypatch, site, spec):
        monkeypatch.setattr("kvq.registry.registry._registry", site.registry())
        register_backend(spec)
        assert get_registry().get_backend("coded") is spec
        assert [info.name for info in available_backends()] == ["coded"]


class TestRequirements:
    @pytest.fixture
    def installed(self, site):
        site.add_distribution("site-vendor 1.5.0", {})
        site.add_distribution("site-preview 2.0rc1", {})
        site.add_distribution("site-odd not.a-version", {})
        importlib.invalidate_caches()
        return site.registry()

    @pytest.mark.parametrize(
        "requirement",
        [
            "site-vendor",
            "site_vendor>=1.5,<2",
            "Site.Vendor[extra]~=1.4",
            "site-preview>=1",
            "site-odd",
            "site-absent; python_version < '3'",
        ],
    )
    def test_met(self, installed, requirement):
        installed.check_requirements(make_spec(requires=(requirement,)))

    @pytest.mark.parametrize(
        ("requirement", "found"),
        [
            ("site-vendor>=2", "version 1.5.0 is installed"),
            ("site-vendor!=1.5.0", "version 1.5.0 is installed"),
            ("site-absent>=1", "it is not installed"),
            ("site-odd>=1", "is installed"),
            ("site-absent; python_version >= '3'", "it is not installed"),
        ],
    )
    def test_not_met(self, installed, requirement, found):
        spec = make_spec(requires=("site-vendor", requirement))
        with pytest.raises(MissingRequirementError) as caught:
            installed.check_requirements(spec)
        message = str(caught.value)
        assert message.startswith(f"backend 'coded' requires {requirement!r}, but ")
        assert found in message
        assert f"pip install {requirement!r}" in message

    def test_they_are_told_from_metadata_alone(self, installed, site):
        site.add_module("site_vendor", "raise SystemExit('imported')")
        installed.check_requirements(make_spec(requires=("site-vendor>=1",)))
        assert site_modules() == []

    def test_a_missing_one_shows_in_the_list_but_does_not_stop_the_name(self, installed):
        spec = make_spec(requires=("site-absent",))
        installed.register_backend(spec)
        info = info_of(installed, "coded")
        assert (info.state, info.spec) == ("missing requirement", spec)
        assert "it is not installed" in info.reason
        assert installed.get_backend("coded") is spec

    def test_every_reason_of_the_list_is_a_backend_error(self, installed):
        installed.register_backend(make_spec(requires=("site-absent",)))
        with pytest.raises(BackendError):
            installed.check_requirements(installed.get_backend("coded"))
