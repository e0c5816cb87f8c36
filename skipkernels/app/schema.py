"""JSON schema of config.yaml for editors; `python -m skipkernels.app.schema` prints it. Imports no torch."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import sys
import types
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from . import config, option_groups
from .config import NOT_IN_FILES, TuneConfig

ADDRESS = "https://raw.githubusercontent.com/skipkernels/skipkernels/main/docs/config.schema.json"


@cache
def descriptions() -> dict[str, str]:
    """Return the help text of each setting, the string below its field, in the order of the groups."""
    found: dict[str, str] = {}
    sources = inspect.getsource(option_groups), inspect.getsource(config)
    for group in (statement for source in sources for statement in ast.parse(source).body):
        if isinstance(group, ast.ClassDef):
            for field, text in zip(group.body, group.body[1:], strict=False):
                if (
                    isinstance(field, ast.AnnAssign)
                    and isinstance(text, ast.Expr)
                    and isinstance(field.target, ast.Name)
                ):
                    found[field.target.id] = " ".join(str(ast.literal_eval(text.value)).split())
    return found


def schema() -> dict[str, Any]:
    """Return the schema.

    Example:
        >>> schema()["properties"]["seed"]["minimum"], schema()["properties"]["graph"]["type"]
        (0, 'boolean')
    """
    hints, texts = get_type_hints(TuneConfig), descriptions()
    fields = {field.name: field for field in dataclasses.fields(TuneConfig)}
    properties = {}
    for name in (name for name in texts if name in fields and name not in NOT_IN_FILES):  # in the order of the groups
        field = fields[name]
        default = str(field.default) if isinstance(field.default, Path) else field.default
        properties[name] = {"description": texts[name], "default": default} | _type(hints[name], field.metadata)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": ADDRESS,
        "title": "Configuration of a run of skipkernels",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }


def _type(hint: Any, bounds: Any) -> dict[str, Any]:
    """Schema of the values of a type."""
    if get_origin(hint) in (Union, types.UnionType):
        return {"anyOf": [_type(option, bounds) for option in get_args(hint)]}
    if get_origin(hint) is Literal:
        return {"enum": list(get_args(hint))}
    if get_origin(hint) is tuple:
        return {"type": "array", "items": _type(get_args(hint)[0], {})}
    names = {int: "integer", float: "number", bool: "boolean", str: "string", Path: "string", type(None): "null"}
    found: dict[str, Any] = {"type": names[hint]}
    if hint in (int, float):
        limits = {"minimum": "minimum", "above": "exclusiveMinimum", "below": "exclusiveMaximum"}
        given = {limits[name]: value for name, value in bounds.items() if name in limits and value is not None}
        found |= {name: value for name, value in given.items() if value != float("inf")}
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(schema(), indent=2) + "\n")
