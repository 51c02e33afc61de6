"""Without lm-evaluation-harness its model type says which extra brings it."""

from __future__ import annotations

import sys

import pytest

from kvq.errors import MissingExtraError


def test_what_is_missing_is_named_and_the_extra_that_brings_it(monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("kvq.evaluation.harness", "lm_eval"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtraError, match=r"needs lm_eval.*pip install '\.\[eval\]'"):
        import kvq.evaluation.harness  # noqa: F401
