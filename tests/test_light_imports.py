"""What is imported when: no vendor's library and no transformers before something asks for them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {"transformers", "optimum", "hqq", "lm_eval", "kvq_backends"}


def modules_after(code: str) -> set[str]:
    """Return the packages of HEAVY that a fresh Python holds once it has run `code`."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return HEAVY & set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "code",
    [
        "import kvq; import kvq.plugin_api",
        "import kvq; assert kvq.available_backends()",
        "from kvq import KVQCacheConfig, LayerConfig; LayerConfig(nbits_k=4)",
    ],
)
def test_nothing_heavy_is_imported_by(code):
    assert modules_after(code) == set()


def test_the_probe_sees_what_is_imported():
    assert modules_after("import kvq_backends") == {"kvq_backends"}
    assert modules_after("import sys, types; sys.modules['hqq.core'] = types.ModuleType('x')") == {"hqq"}


def test_naming_a_backend_imports_its_plugin_but_no_library():
    code = "from kvq.registry import available_backends; available_backends(load=True)"
    assert modules_after(code) == {"kvq_backends"}
