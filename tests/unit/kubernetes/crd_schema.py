"""What an API server would say of a custom resource with strict field validation, from the resource's definition.

Unknown and duplicated fields are refused, types and enumerations hold, defaults are taken to be filled in. Rules in CEL
are not evaluated: tests/unit/kubernetes/test_manifests.py has the operator's rules that matter here.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import yaml

Kind = tuple[str, str]
"""apiVersion, kind."""

OBJECT = {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {"type": "object"}}


class StrictLoader(yaml.CSafeLoader):
    """Refuses a mapping that has a key twice; YAML parsers keep the last, silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise yaml.YAMLError(f"{', '.join(sorted(twice))} stands twice{node.start_mark}")
        return super().construct_mapping(node, deep)


def load_definitions(folder: Path) -> dict[Kind, jsonschema.Draft7Validator]:
    """A validator for each version of each kind that the compressed definitions in `folder` describe."""
    found = {}
    for path in sorted(folder.glob("*.yaml.gz")):
        definition = yaml.load(gzip.decompress(path.read_bytes()), yaml.CSafeLoader)["spec"]
        for version in definition["versions"]:
            schema = strict(version["schema"]["openAPIV3Schema"])
            schema["properties"] = schema["properties"] | OBJECT
            kind = (f"{definition['group']}/{version['name']}", definition["names"]["kind"])
            found[kind] = jsonschema.Draft7Validator(schema)
    return found


def problems(resource: Mapping[str, Any], definitions: Mapping[Kind, jsonschema.Draft7Validator]) -> list[str]:
    """`path: what is wrong`, for every problem."""
    validator = definitions[resource["apiVersion"], resource["kind"]]
    errors = validator.iter_errors(resource)
    return [f"/{'/'.join(map(str, error.absolute_path))}: {error.message[:200]}" for error in errors]


def strict(schema: Any) -> Any:
    """An OpenAPI schema of Kubernetes as JSON Schema, closed to fields that it does not name."""
    if not isinstance(schema, Mapping):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    result: dict[str, Any] = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes-")}
    properties = {name: strict(value) for name, value in schema.get("properties", {}).items()}
    if properties:
        result["properties"] = properties
    for key in ("items", "additionalProperties"):
        if key in schema:
            result[key] = strict(schema[key])
    for key in ("allOf", "anyOf", "oneOf"):
        if key in schema:
            # alternatives say what must be there; which fields there are is said outside of them
            result[key] = list(schema[key])
    open_object = schema.get("x-kubernetes-preserve-unknown-fields") or schema.get("x-kubernetes-embedded-resource")
    if properties and "additionalProperties" not in schema and not open_object:
        result["additionalProperties"] = False
    if "required" in schema:
        defaulted = {name for name, value in schema.get("properties", {}).items() if "default" in value}
        result["required"] = [name for name in schema["required"] if name not in defaulted]
    if schema.get("nullable") and isinstance(schema.get("type"), str):
        result["type"] = [schema["type"], "null"]
    return result
