"""Write docs/config.schema.json, the JSON schema of config.yaml for editors: `python tools/config_schema.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from docstring_parser import parse_from_object
from pydantic import TypeAdapter

from skipkernels.app.config import NOT_IN_FILES, SCHEMA_ADDRESS, TuneConfig

FILE = Path(__file__).parents[1] / "docs" / "config.schema.json"


def schema() -> dict[str, Any]:
    """JSON schema of `TuneConfig`, with the strings below its fields as descriptions."""
    found = TypeAdapter(TuneConfig).json_schema()
    groups = (parse_from_object(group) for group in TuneConfig.__mro__[:-1])
    texts = {setting.arg_name: setting.description for group in groups for setting in group.params}
    properties = {}
    for name, setting in found["properties"].items():
        if name not in NOT_IN_FILES:
            del setting["title"]
            properties[name] = {"description": " ".join((texts[name] or "").split())} | setting
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": SCHEMA_ADDRESS,
        "title": "Configuration of a run of skipkernels",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps(schema(), indent=2) + "\n")
