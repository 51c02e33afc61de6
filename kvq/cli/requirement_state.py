"""Requirements as plain values for tables and JSON; `kvq.installed` decides which are met."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from packaging.requirements import Requirement

from kvq.installed import applies, find_version, is_met


def describe_requirements(texts: Sequence[str], extra: str = "") -> list[dict[str, Any]]:
    """Return the requirements that hold here as `name`, `required`, `installed` (a version or None) and `met`.

    Args:
        texts: requirements, written as in metadata.
        extra: the extra whose requirements are listed too.
    """
    requirements = [one for one in map(Requirement, texts) if applies(one, extra)]
    return [
        {
            "name": one.name,
            "required": str(one.specifier),
            "installed": find_version(one.name),
            "met": is_met(one),
        }
        for one in requirements
    ]
