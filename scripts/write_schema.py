"""Write the JSON schema of the configuration, by which editors complete and check YAML.

python scripts/write_schema.py
"""

from __future__ import annotations

import json
from pathlib import Path

from kvq import KVQCacheConfig

SCHEMA = Path(__file__).resolve().parents[1] / "docs" / "kvq-config.schema.json"


def render_schema() -> str:
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **KVQCacheConfig.model_json_schema()}
    return json.dumps(schema, indent=2) + "\n"


if __name__ == "__main__":
    SCHEMA.write_text(render_schema(), encoding="utf-8")
