"""A plugin of pytest that writes down what failed and where the code under test was imported from.

`run.py` loads it with `-p verdict_plugin` into the pytest that judges a mutant, and reads the file KVQ_VERDICT.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

FAILURES = []


def pytest_exception_interact(node, call):
    """Note the test and the class of its error with all bases, by name."""
    error = call.excinfo.value
    while getattr(error, "exceptions", None):  # hypothesis groups the failures that it found
        error = error.exceptions[0]
    FAILURES.append({"test": node.nodeid, "error": [kind.__name__ for kind in type(error).__mro__]})


def pytest_sessionfinish():
    """Write the verdict."""
    modules = sorted(
        str(Path(module.__file__).resolve())
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] in ("kvq", "kvq_backends") and getattr(module, "__file__", None)
    )
    Path(os.environ["KVQ_VERDICT"]).write_text(json.dumps({"failures": FAILURES, "modules": modules}))
