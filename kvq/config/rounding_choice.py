"""Where a configuration asks for codes that are chosen for the queries, and what that needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from kvq.calibration import Calibration
from kvq.calibration.calibration import StandardCalibration
from kvq.user_warnings import warn_user

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
    asking = _find_asking(places)
    if asking is not None and calibration is None:
        raise ValueError(
            f"{asking}={ERROR_FEEDBACK!r} needs statistics of the model's queries: write them to a file by `kvq "
            f"calibrate --model ... --out FILE`, and give its path; {NEAREST!r} needs none"
        )


def warn_of_unknown_queries(calibration: Calibration | None, places: Mapping[str, str]) -> bool:
    """Return whether error feedback is asked for, and warn of a calibration that knows no queries of a model.

    Args:
        calibration: that of the configuration.
        places: as `list_places` returns them.
    """
    asking = _find_asking(places)
    if asking is not None and isinstance(calibration, StandardCalibration):
        warn_user(
            f"{asking}={ERROR_FEEDBACK!r} has no effect: calibration {calibration} knows no model's queries; write a "
            "file by `kvq calibrate --model ... --out FILE`, and give its path"
        )
    return asking is not None


def _find_asking(places: Mapping[str, str]) -> str | None:
    """Return the first place that asks for error feedback."""
    return next((place for place, word in places.items() if word == ERROR_FEEDBACK), None)
