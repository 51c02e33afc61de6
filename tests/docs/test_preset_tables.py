"""The results of presets: those that `kvq presets` shows are the committed ones, of the presets of today."""

from __future__ import annotations

import json

import preset_tables
from preset_tables import EXCERPT, render_excerpt

from kvq.cli.preset_facts import DEFAULT
from kvq.config import PRESETS


def test_the_excerpt_is_current():
    assert EXCERPT.read_text(encoding="utf-8") == render_excerpt(), "run scripts/preset_tables.py"


def test_every_preset_was_measured_as_it_is_today():
    assert json.loads(render_excerpt())["kl"].keys() == {*PRESETS, DEFAULT}


def test_what_was_measured_with_other_fields_is_left_out(monkeypatch):
    result = preset_tables.load_result()
    for record in result["records"]:
        if record["label"] == "4bit":
            record["settings"]["nbits_v"] = 5
    monkeypatch.setattr(preset_tables, "load_result", lambda: result)
    assert json.loads(render_excerpt())["kl"].keys() == {*PRESETS, DEFAULT} - {"4bit"}
