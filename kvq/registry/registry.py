"""Backends by name: listing, loading, registering; the only file that touches pluggy's manager.

Names come from entry-point metadata, without an import. A plugin is imported when its name is asked for, and a vendor's
library when a quantizer is built. An error in one plugin stays there: it is kept as that backend's state, and raised
only for a caller who names that backend.
"""

from __future__ import annotations

import difflib
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Literal

import pluggy

from kvq.errors import (
    BackendConflictError,
    BackendError,
    BlockedBackendError,
    BrokenBackendError,
    MissingRequirementError,
    UnknownBackendError,
)
from kvq.plugin_api import hooks
from kvq.plugin_api.backend_spec import BackendSpec
from kvq.registry.discovery import Claim, ClaimedName, find_entry_points, group_claims, join_claims
from kvq.registry.requirements import check_requirements
from kvq.registry.spec_validation import check_spec

ALLOW_VARIABLE = "KVQ_PLUGINS"
"""Environment variable: the only names that may be loaded, separated by commas; unset or empty: all may."""

BLOCK_VARIABLE = "KVQ_BLOCK_PLUGINS"
"""Environment variable: names that may not be loaded, separated by commas; it wins over the other one."""

State = Literal["available", "ready", "blocked", "conflict", "broken", "missing requirement"]


@dataclass(frozen=True)
class BackendInfo:
    """A backend as it is listed.

    Attributes:
        name: the name that users write.
        origin: the distribution that offers it, or `register_backend`.
        version: that distribution's version, or an empty string.
        state: `available` (named by an entry point, not imported yet), `ready` (imported, valid, requirements met),
            or why it cannot be used.
        reason: the reason in words; empty if there is none.
        spec: the backend's own description, once its plugin is imported.
    """

    name: str
    origin: str
    version: str
    state: State
    reason: str = ""
    spec: BackendSpec | None = None


class BackendRegistry:
    """Backends by name.

    Args:
        finder: returns the entry points; asked once, at the first use.
        environment: holds the allow and deny lists, which are read at every use; `os.environ` by default.
    """

    def __init__(
        self,
        finder: Callable[[], Iterable[metadata.EntryPoint]] = find_entry_points,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._finder = finder
        self._environment = os.environ if environment is None else environment
        self._loader = _PluginLoader()
        self._claims: dict[str, ClaimedName] | None = None
        self._loaded: dict[str, BackendSpec] = {}
        self._registered: dict[str, BackendSpec] = {}
        self._failures: dict[str, str] = {}
        self._lock = threading.RLock()

    def get_backend(self, name: str) -> BackendSpec:
        """Return the backend called `name`, importing its plugin at the first call.

        Raises:
            BackendError: unknown, blocked, claimed twice, or broken; the subclass and the message say which.
        """
        with self._lock:
            try:
                return self._load_backend(name)
            except BrokenBackendError as error:
                raise BrokenBackendError(f"{error}{self._alternatives()}") from error.__cause__

    def register_backend(self, spec: BackendSpec, *, replace: bool = False) -> None:
        """Add a backend from code, without an entry point.

        Args:
            spec: the backend.
            replace: whether a backend registered from code under the same name may be replaced.

        Raises:
            BackendConflictError: the name is taken by an installed plugin, or by `register_backend` without `replace`.
            BrokenBackendError: the spec is not valid.
        """
        check_spec(spec, getattr(spec, "name", "?"), "register_backend")
        with self._lock:
            taken = self._find_claims().get(spec.name)
            if taken is not None:
                raise BackendConflictError(
                    f"backend {spec.name!r} cannot be registered: the name belongs to {join_claims(taken.owners)}; "
                    "choose another name"
                )
            known = self._registered.get(spec.name)
            if known is not None and known is not spec and not replace:
                raise BackendConflictError(
                    f"backend {spec.name!r} is already registered; choose another name, or pass replace=True"
                )
            self._registered[spec.name] = spec

    def available_backends(self, *, load: bool = False) -> list[BackendInfo]:
        """List every backend, sorted by name.

        Args:
            load: import each plugin, to know its faults and capabilities; otherwise only metadata is read.
        """
        with self._lock:
            return [self._describe(name, load=load) for name in self._names()]

    def check_requirements(self, spec: BackendSpec) -> None:
        """Check from metadata, without an import, that the requirements of `spec` are installed.

        Raises:
            MissingRequirementError: a requirement is absent or too old; the message names it and the remedy.
        """
        try:
            check_requirements(spec)
        except MissingRequirementError as error:
            with self._lock:
                raise MissingRequirementError(f"{error}{self._alternatives()}") from None

    def describe_alternatives(self) -> str:
        """Return the end of a message about an unavailable backend: those that need nothing more, if there are any."""
        with self._lock:
            return self._alternatives()

    def _load_backend(self, name: str) -> BackendSpec:
        if name in self._registered:
            return self._registered[name]
        claim = self._get_owner(name)
        if name in self._failures:
            # A new error: a stored one would grow its traceback at every raise, and keep the first one's frames alive.
            raise BrokenBackendError(self._failures[name])
        if name not in self._loaded:
            try:
                self._loaded[name] = self._loader.load(claim)
            except BrokenBackendError as error:
                self._failures[name] = str(error)
                raise
        return self._loaded[name]

    def _alternatives(self) -> str:
        """Return the end of a message about an unavailable backend: the backends that need nothing but kvq.

        Foreign plugins that nobody has named stay unimported, so the list has only those that are already loaded.
        """
        own = {name for name, claimed in self._find_claims().items() if claimed.is_own}
        names = [name for name in sorted({*own, *self._loaded, *self._registered}) if self._needs_nothing(name)]
        return f"; backends that need nothing more: {', '.join(names)}" if names else ""

    def _needs_nothing(self, name: str) -> bool:
        try:
            return not self._load_backend(name).requires
        except BackendError:
            return False

    def _find_claims(self) -> dict[str, ClaimedName]:
        if self._claims is None:
            self._claims = group_claims(self._finder())
        return self._claims

    def _names(self) -> list[str]:
        return sorted({*self._find_claims(), *self._registered})

    def _get_owner(self, name: str) -> Claim:
        claimed = self._find_claims().get(name)
        if claimed is None:
            raise UnknownBackendError(self._unknown_message(name))
        self._check_allowed(name)
        if len(claimed.owners) > 1:
            raise BackendConflictError(
                f"backend {name!r} is offered by {join_claims(claimed.owners)}; uninstall all but one of them"
            )
        return claimed.owners[0]

    def _check_allowed(self, name: str) -> None:
        if name in (self._find_listed(BLOCK_VARIABLE) or set()):
            raise BlockedBackendError(f"backend {name!r} is blocked by {BLOCK_VARIABLE}; take it out of that list")
        allowed = self._find_listed(ALLOW_VARIABLE)
        if allowed is not None and name not in allowed:
            raise BlockedBackendError(f"backend {name!r} is blocked: {ALLOW_VARIABLE} does not list it; add it there")

    def _find_listed(self, variable: str) -> set[str] | None:
        """Return the names in a list; None if the variable is unset or, as in a file of variables, left empty."""
        text = self._environment.get(variable, "").strip()
        return {part.strip() for part in text.split(",") if part.strip()} if text else None

    def _unknown_message(self, name: str) -> str:
        names = self._names()
        near = difflib.get_close_matches(str(name), names, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        message = f"backend {name!r} is unknown; {hint}known: {', '.join(map(repr, names)) or 'none'}"
        if any(claimed.is_own for claimed in self._find_claims().values()):
            return f"{message}; install a plugin that offers it, or call register_backend"
        return f"{message}; kvq's own backends are not installed: run `pip install -e .` in the checkout"

    def _describe(self, name: str, *, load: bool) -> BackendInfo:
        if name in self._registered:
            info = BackendInfo(name, "register_backend", "", "ready", spec=self._registered[name])
        else:
            claimed = self._find_claims()[name]
            reason = f"the name is reserved; ignored: {join_claims(claimed.ignored)}" if claimed.ignored else ""
            owner = claimed.owners[0]
            info = BackendInfo(name, owner.distribution, owner.version, "available", reason)
        try:
            if not (load or name in self._registered or name in self._loaded or name in self._failures):
                self._get_owner(name)
                return info
            info = replace(info, state="ready", spec=self._load_backend(name))
            check_requirements(self._load_backend(name))
        except BackendError as error:
            reasons = (info.reason, str(error))
            return replace(info, state=_STATES[type(error)], reason="; ".join(filter(None, reasons)))
        return info


_STATES: dict[type[BackendError], State] = {
    BlockedBackendError: "blocked",
    BackendConflictError: "conflict",
    BrokenBackendError: "broken",
    MissingRequirementError: "missing requirement",
}


class _PluginLoader:
    """Imports plugins and calls their hook, one at a time."""

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager(hooks.PROJECT_NAME)
        self._manager.add_hookspecs(hooks)

    def load(self, claim: Claim) -> BackendSpec:
        """Return the plugin's backend; a plugin that fails leaves nothing behind.

        Raises:
            BrokenBackendError: it cannot be imported, has no hook, or its hook fails or returns no valid spec.
        """
        name = claim.entry_point.name
        plugin_name = f"{claim.entry_point.group}:{name}"
        try:
            return check_spec(self._call_hook(claim, plugin_name), name, str(claim))
        except BaseException as error:
            if self._manager.has_plugin(plugin_name):
                self._manager.unregister(name=plugin_name)
            if isinstance(error, (BrokenBackendError, KeyboardInterrupt)):
                raise
            # Foreign code may raise anything, even sys.exit or a panic of a native extension; it stays with its name.
            raise BrokenBackendError(
                f"backend {name!r} from {claim} cannot be loaded: {type(error).__name__}: {error}; "
                "repair or uninstall that distribution"
            ) from error

    def _call_hook(self, claim: Claim, plugin_name: str) -> object:
        plugin = claim.entry_point.load()
        self._manager.register(plugin, name=plugin_name)
        if not any(caller.name == "kvq_backend" for caller in self._manager.get_hookcallers(plugin) or ()):
            raise TypeError(f"{claim.entry_point.value} has no function kvq_backend marked with @hookimpl")
        others = [other for other in self._manager.get_plugins() if other is not plugin]
        results = self._manager.subset_hook_caller("kvq_backend", remove_plugins=others)()
        return results[0] if results else None  # pluggy drops a None


_registry = BackendRegistry()


def get_registry() -> BackendRegistry:
    """Return the registry of this process."""
    return _registry


def register_backend(spec: BackendSpec, *, replace: bool = False) -> None:
    """Add a backend from code; see `BackendRegistry.register_backend`."""
    _registry.register_backend(spec, replace=replace)


def available_backends(*, load: bool = False) -> list[BackendInfo]:
    """List the backends of this process; see `BackendRegistry.available_backends`."""
    return _registry.available_backends(load=load)
