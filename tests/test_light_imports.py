"""What is imported when: no vendor's library and no transformers before something asks for them."""

from __future__ import annotations

import json
import subprocess
import sys

HEAVY = {"transformers", "optimum", "hqq", "lm_eval", "kvq_backends"}


def modules_after(*pieces: str) -> list[set[str]]:
    """Return the packages of HEAVY that a fresh Python holds after each of some pieces of code, run in turn."""
    report = "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    script = "\n".join(["import json, sys", *(f"{piece}\n{report}" for piece in pieces)])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return [HEAVY & set(json.loads(line)) for line in done.stdout.splitlines()]


def test_nothing_heavy_is_imported_until_a_backend_is_named():
    light = [
        "import kvq; import kvq.plugin_api",
        "assert kvq.available_backends()",
        "from kvq import KVQCacheConfig, LayerConfig; LayerConfig(nbits_k=4)",
    ]
    naming = "from kvq.registry import available_backends; available_backends(load=True)"
    assert modules_after(*light, naming) == [set(), set(), set(), {"kvq_backends"}]


def test_the_probe_sees_what_is_imported():
    fake = "import types; sys.modules['hqq.core'] = types.ModuleType('x')"
    assert modules_after("import kvq_backends", fake) == [{"kvq_backends"}, {"kvq_backends", "hqq"}]
