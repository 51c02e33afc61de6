"""Checks of a backend's declaration, and of its configuration."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from kvq.calibration.calibration import STANDARD
from kvq.config import KVQCacheConfig
from kvq.config.field_types import SIDES
from kvq.errors import BrokenBackendError, CheckNotApplicableError, ConfigError, KVQError
from kvq.layers.quantizer_factory import build_codec
from kvq.plugin_api.backend_spec import API_VERSION, BackendSpec
from kvq.registry import get_registry
from kvq.registry.discovery import find_entry_points, group_claims
from kvq.registry.spec_validation import check_spec as validate_spec
from kvq.testing.case import ContractCase, encode_blocks, is_same, list_cases, require

UNUSED_GROUP_SIZES = (32, 128)
"""Two group sizes that would give other bytes if they were used."""
DEFAULTS_HEAD_DIM = 128
UNKNOWN_OPTION = "no_such_option_of_any_backend"
_PROBE = """
import json, sys
import kvq.plugin_api
before = set(sys.modules)
from importlib import import_module
import_module(sys.argv[1]).kvq_backend()
print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
"""


def check_spec(case: ContractCase) -> None:
    """The spec is valid for this plugin API, has a summary, and its requirements can be parsed."""
    backend = case.backend
    try:
        validate_spec(backend, backend.name, "the backend under test")
    except BrokenBackendError as error:
        require(False, str(error))
    require(backend.api_version == API_VERSION, f"api_version={backend.api_version}, this kvq has {API_VERSION}")
    require(
        backend.summary.strip(),
        "summary is empty: `kvq backends` has nothing to show; describe the backend in a line",
    )
    require("\n" not in backend.summary, "summary has more than one line")
    require(
        len(set(backend.capabilities.nbits)) == len(backend.capabilities.nbits), "capabilities.nbits repeats itself"
    )


def check_light_import(case: ContractCase) -> None:
    """The module with the hook imports only kvq, modules that kvq itself imports, and its own distribution."""
    claimed = group_claims(find_entry_points()).get(case.backend.name)
    if claimed is None:
        raise CheckNotApplicableError(f"{case.backend.name} has no entry point; it was registered from code")
    claim = claimed.owners[0]
    homes = metadata.packages_distributions()
    # Options are models of pydantic, which imports parts of itself when it first meets a kind of field.
    own = {canonicalize_name(claim.distribution), "kvq", "pydantic"}
    heavy = sorted(
        name
        for name in _modules_imported_by(claim.entry_point.module)
        if name not in sys.stdlib_module_names
        and name in homes
        and not own & {canonicalize_name(home) for home in homes[name]}
    )
    require(
        not heavy,
        f"{claim.entry_point.module} imports {', '.join(heavy)} before a quantizer is built; import inside `build`",
    )


def check_options(case: ContractCase) -> None:
    """Options have defaults, every one is described, unknown ones are refused with their path."""
    backend = case.backend
    for name, option in backend.options.model_fields.items():
        require(
            option.description and option.description.strip(),
            f"option {name!r} of {backend.options.__name__} has no description; give its Field one",
        )
        require(not option.is_required(), f"option {name!r} has no default: backend={backend.name!r} alone must work")
    fault = _find_fault(case, backend_options={backend.name: {UNKNOWN_OPTION: 1}})
    expected = ("backend_options", backend.name, UNKNOWN_OPTION)
    require(fault == expected, f"an unknown option is not refused at {'.'.join(expected)}, but at {fault}")


def check_defaults(case: ContractCase) -> None:
    """What the backend proposes works alone, and one that says it uses no group size stores the same bytes at any."""
    backend = case.backend
    if not (backend.defaults or not backend.uses_group_size):
        fault = _find_refusal(case)
        raise CheckNotApplicableError(f"it proposes nothing{fault and f', and alone it is refused: {fault}'}")
    fault = _find_refusal(case)
    require(not fault, f"backend={backend.name!r} alone is refused, with the defaults that it proposes: {fault}")
    if not backend.uses_group_size:
        _check_group_size_is_unused(case)


def _check_group_size_is_unused(case: ContractCase) -> None:
    for one in list_cases(case.backend, case.options):
        small, large = (one.quantizer(group_size=size) for size in UNUSED_GROUP_SIZES)
        require(dict(small.layout()) == dict(large.layout()), f"{one}: the layout depends on q_group_size")
        states = one.states(2 * small.block_length)
        parts = encode_blocks(small, states)
        for name, part in encode_blocks(large, states).items():
            require(
                is_same(part, parts[name]), f"{one}: {name!r} depends on q_group_size, and uses_group_size is False"
            )


def _find_refusal(case: ContractCase) -> str:
    """Return why a configuration that sets nothing but the backend is refused, or an empty string."""
    options: dict[str, Any] = {"backend_options": {case.backend.name: dict(case.options)}} if case.options else {}
    if case.backend.calibration == "required":
        options["calibration"] = STANDARD
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = KVQCacheConfig(backend=case.backend, **options)
            for side in SIDES:
                build_codec(config.for_layer(0), side, 0, case.states(0, head_dim=DEFAULTS_HEAD_DIM))
    except KVQError as error:
        return str(error)
    return ""


def check_configuration(case: ContractCase) -> None:
    """Keywords, a mapping and a file mean the same; an unsupported width is refused with its path."""
    config = case.config()
    require(KVQCacheConfig.from_mapping(case.config_fields()) == config, "a mapping does not mean the same as keywords")
    if _is_named(case.backend):
        text = config.to_yaml()
        require(KVQCacheConfig.from_mapping(yaml.safe_load(text)) == config, "YAML does not mean the same as keywords")
        for suffix, written in ((".yaml", text), (".json", json.dumps(config.to_dict()))):
            require(_read_file(written, suffix) == config, f"a {suffix} file does not mean the same as keywords")
    offered = case.backend.capabilities.nbits
    absent = next(bits for bits in (7.25, 5.125, 9.5) if bits not in offered)
    fault = _find_fault(case, nbits_k=absent)
    require(fault == ("nbits_k",), f"nbits_k={absent}, which is not supported, is refused at {fault}")


def check_requirements(case: ContractCase) -> None:
    """`requires` names all that `build` needs: it is installed, and a quantizer is built."""
    try:
        get_registry().check_requirements(case.backend)
    except KVQError as error:
        require(False, str(error))
    quantizer = case.quantizer()
    module = getattr(quantizer, "kind", type(quantizer)).__module__
    declared = {canonicalize_name(Requirement(text).name) for text in case.backend.requires}
    missing = _undeclared(module, declared | {"kvq", *_runtime_of("kvq")})
    require(not missing, f"{module} uses {', '.join(missing)}, which `requires` does not name")


def _undeclared(module_name: str, declared: set[str]) -> list[str]:
    """Return the distributions that the globals of a module come from and that are not declared."""
    homes = metadata.packages_distributions()
    own = {canonicalize_name(home) for home in homes.get(module_name.partition(".")[0], ())}
    used = {
        getattr(value, "__module__", None) or getattr(value, "__name__", "")
        for value in vars(importlib.import_module(module_name)).values()
    }
    packages = {str(name).partition(".")[0] for name in used}
    found = {canonicalize_name(home) for name in packages for home in homes.get(name, ())}
    return sorted(found - own - declared)


def _runtime_of(distribution: str) -> set[str]:
    """Return the distributions that one requires directly."""
    try:
        required = metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:
        return {"torch"}
    return {canonicalize_name(Requirement(text).name) for text in required}


def _modules_imported_by(module: str) -> list[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", _PROBE, module]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)  # noqa: S603  # ours
    require(done.returncode == 0, f"{module} cannot be imported in a fresh process: {done.stderr.strip()[-300:]}")
    names: list[str] = json.loads(done.stdout.splitlines()[-1])
    return names


def _find_fault(case: ContractCase, **fields: Any) -> tuple[str | int, ...] | None:
    """Return the path of the one fault of a configuration, or None if it is accepted."""
    try:
        case.config(**fields)
    except ConfigError as error:
        return error.faults[0].path if len(error.faults) == 1 else None
    return None


def _is_named(backend: BackendSpec) -> bool:
    try:
        return get_registry().get_backend(backend.name) is backend
    except KVQError:
        return False


def _read_file(text: str, suffix: str) -> KVQCacheConfig:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"config{suffix}"
        path.write_text(text, encoding="utf-8")
        return KVQCacheConfig.from_file(path)
