"""What the registry says about itself: for ``kvtool methods``, the documentation and its tests."""

from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from typing import Any

from pydantic import TypeAdapter

from kvtool.errors import MethodOptionError
from kvtool.methods import METHODS, suggest

_BOUNDS = {
    "minimum": ">=",
    "exclusiveMinimum": ">",
    "maximum": "<=",
    "exclusiveMaximum": "<",
    "multipleOf": "multiple of",
}


@dataclass(frozen=True)
class Option:
    """One ``-o NAME VALUE``: a field of a method's dataclass."""

    name: str
    type: str
    default: Any
    range: str
    description: str


@dataclass(frozen=True)
class Description:
    """One method, as a table row or a page needs it."""

    name: str
    summary: str
    paper: str
    block: int | None
    kernel: bool
    options: tuple[Option, ...]

    def record(self) -> dict[str, Any]:
        """The JSON object of ``kvtool methods --json``."""
        return asdict(self)


def describe(name: str | None = None) -> list[Description]:
    """The method ``name``, or all of them in the order of the registry.

    Raises:
        MethodOptionError: no such method; the nearest name is suggested.
    """
    if name is not None and name not in METHODS:
        raise MethodOptionError(f"no method '{name}'; {suggest(name, METHODS)}")
    return [_describe(one) for one in METHODS if name in (None, one)]


def _describe(name: str) -> Description:
    method = METHODS[name]
    schema = TypeAdapter(method).json_schema()
    options = tuple(_option(field.name, schema["properties"][field.name]) for field in fields(method))
    return Description(name, method.summary, method.paper, method.block, _has_kernel(name), options)


def _has_kernel(name: str) -> bool:
    # without importing it: that would import triton
    return find_spec(f"kvtool.kernels.{name}") is not None


def _option(name: str, schema: dict[str, Any]) -> Option:
    kinds = schema.get("anyOf", [schema])
    bounds = [f"{sign} {kind[key]}" for kind in kinds for key, sign in _BOUNDS.items() if key in kind]
    choices = [str(choice) for kind in kinds for choice in kind.get("enum", [kind["const"]] if "const" in kind else [])]
    return Option(
        name=name,
        type=" or ".join(_type(kind) for kind in kinds),
        default=schema.get("default"),
        range=", ".join(choices or bounds),
        description=schema.get("description", ""),
    )


def _type(kind: dict[str, Any]) -> str:
    if kind.get("type") == "array":
        return f"list of {_type(kind.get('items', {}))}"
    return {"null": "none", "boolean": "true/false", "string": "word"}.get(
        kind.get("type", ""), kind.get("type", "any")
    )
