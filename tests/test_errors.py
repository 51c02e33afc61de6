"""The error tree: what each class may be caught as, what it says, and that it travels between processes."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest

import kvq.errors
from kvq.errors import BackendError, ConfigError, Fault, KVQError, UnknownBackendError

TREE = {
    "ConfigError": (KVQError, ValueError),
    "BackendError": (KVQError, Exception),
    "UnknownBackendError": (BackendError, LookupError),
    "BlockedBackendError": (BackendError, LookupError),
    "BackendConflictError": (BackendError, LookupError),
    "BrokenBackendError": (BackendError, ImportError),
    "MissingRequirementError": (BackendError, ImportError),
    "BackendFailedError": (BackendError, RuntimeError),
    "QuantizerContractError": (KVQError, TypeError),
    "StatesError": (KVQError, ValueError),
    "ModelError": (KVQError, ValueError),
    "EvaluationError": (KVQError, ValueError),
    "MissingExtraError": (KVQError, ImportError),
    "CacheFileError": (KVQError, ValueError),
    "CalibrationError": (KVQError, ValueError),
    "ContractViolationError": (KVQError, AssertionError),
    "CheckNotApplicableError": (KVQError, LookupError),
    "CacheStateError": (KVQError, RuntimeError),
}
CLASSES = {
    name: value
    for name, value in vars(kvq.errors).items()
    if inspect.isclass(value) and issubclass(value, BaseException) and value.__module__ == "kvq.errors"
}


def make_error(error_class):
    if error_class is ConfigError:
        return ConfigError([Fault(("layers", "0-3", "nbits_k"), "5 is not supported")], "kvq.yaml")
    return error_class("what was asked; what is accepted")


def test_every_class_is_in_the_tree_above():
    assert set(CLASSES) == {*TREE, "KVQError"}


@pytest.mark.parametrize("name", TREE)
def test_each_class_may_be_caught_as_what_it_promises(name):
    parent, builtin = TREE[name]
    for caught in (KVQError, parent, builtin):
        with pytest.raises(caught):
            raise make_error(CLASSES[name])


@pytest.mark.parametrize("name", TREE)
def test_no_message_is_quoted_as_that_of_a_key_error(name):
    error = make_error(CLASSES[name])
    assert not isinstance(error, KeyError)
    assert not str(error).startswith(("'", '"'))


@pytest.mark.parametrize("name", TREE)
def test_the_drawing_in_the_module_shows_each_class_with_its_built_in(name):
    lines = [line for line in kvq.errors.__doc__.splitlines() if name in line.replace("(", " ").split()]
    assert len(lines) == 1
    builtin = TREE[name][1]
    assert builtin is Exception or f"({builtin.__name__})" in lines[0]


@pytest.mark.parametrize("copy_error", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])  # noqa: S301
@pytest.mark.parametrize("name", TREE)
def test_errors_survive_being_copied(name, copy_error):
    error = make_error(CLASSES[name])
    restored = copy_error(error)
    assert type(restored) is type(error)
    assert str(restored) == str(error)


def test_a_pickled_config_error_keeps_its_faults_and_their_causes():
    cause = UnknownBackendError("backend 'x' is unknown")
    error = ConfigError([Fault(("backend",), str(cause), cause), Fault(("nbits_k",), "no")], "kvq.yaml")
    restored = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert [fault.path for fault in restored.faults] == [("backend",), ("nbits_k",)]
    assert type(restored.faults[0].cause) is UnknownBackendError
    assert restored.source == "kvq.yaml"


@pytest.mark.parametrize(
    ("path", "location"),
    [
        ((), "configuration"),
        (("nbits_k",), "nbits_k"),
        (("layers", "0-3", "nbits_k"), "layers['0-3'].nbits_k"),
        (("backend_options", "testing", "thresholds", 1), "backend_options.testing.thresholds[1]"),
    ],
)
def test_a_fault_is_located_as_a_person_writes_it(path, location):
    assert str(Fault(path, "is wrong")) == f"{location}: is wrong"


def test_one_fault_is_told_in_one_line_and_more_in_a_list():
    first, second = Fault(("nbits_k",), "first"), Fault(("device",), "second").within("layers", "0")
    assert str(ConfigError([first])) == "nbits_k: first"
    assert str(ConfigError([first], "a.yaml")) == "nbits_k: first (from a.yaml)"
    expected = "2 faults in a.yaml:\n  - nbits_k: first\n  - layers['0'].device: second"
    assert str(ConfigError([first, second], "a.yaml")) == expected
