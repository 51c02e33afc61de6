"""Where a configuration asks for codes that are chosen for the queries, and what that needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from kvq.calibration import Calibration

ROUNDING_FIELD = "rounding_k"
NEAREST: Final = "nearest"
ERROR_FEEDBACK: Final = "error_feedback"


def list_places(fields: Mapping[str, Any]) -> dict[str, str]:
    """Return what a configuration and its entries of `layers` set, by the place; wrong fields are missing.

    Args:
        fields: the fields of the configuration.
    """
    entries = {f"layers[{text!r}].": layer.rounding_k for text, layer in fields.get("layers", {}).items()}
    places = {"": fields.get(ROUNDING_FIELD), **entries}
    return {f"{place}{ROUNDING_FIELD}": word for place, word in places.items() if word is not None}


def check_rounding(calibration: Calibration | None, places: Mapping[str, str]) -> None:
    """Check that error feedback has the statistics that it needs.

    Args:
        calibration: that of the configuration.
        places: as `list_places` returns them.

    Raises:
        ValueError: there are none.
    """
    asking = next((place for place, word in places.items() if word == ERROR_FEEDBACK), None)
    if asking is not None and calibration is None:
        raise ValueError(
            f"{asking}={ERROR_FEEDBACK!r} needs statistics of the model's queries: write them to a file by `kvq "
            f"calibrate --model ... --out FILE`, and give its path; {NEAREST!r} needs none"
        )
