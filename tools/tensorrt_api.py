"""Names and parameters of TensorRT's Python API, of classes that `tests/typings/tensorrt` names.

Tests hold every call that corp_onnx makes against these lists, one for each major version::

    python -m tools.tensorrt_api stubs tensorrt_bindings/tensorrt.pyi tests/tensorrt_api/10.13.json
    python -m tools.tensorrt_api bindings tensorrt_bindings tests/tensorrt_api/11.4.json

The first reads the file of the package tensorrt-stubs, the second a module that can be imported.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import sys
from pathlib import Path

TYPINGS = Path(__file__).parents[1] / "tests" / "typings" / "tensorrt" / "__init__.pyi"

Member = str | list[list[str]]
"""``value``, ``property``, ``settable``, or the parameters of every overload of a method.

A parameter that may be left out ends in ``=``.
"""


def named_classes() -> list[str]:
    """The classes that corp_onnx uses."""
    body = ast.parse(TYPINGS.read_text()).body
    return [node.name for node in body if isinstance(node, ast.ClassDef) and node.name[0] != "_"]


def from_stubs(path: Path) -> dict[str, dict[str, Member]]:
    """What a stub file says; lines that are no Python, of which there are some, are left out."""
    wanted = named_classes()
    classes = [node for node in _parsed(path.read_text()).body if isinstance(node, ast.ClassDef)]
    return {node.name: members(node) for node in classes if node.name in wanted}


def members(node: ast.ClassDef) -> dict[str, Member]:
    """The members of a class in a stub file."""
    found: dict[str, Member] = {}
    for each in node.body:
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
            kind = "value" if "ClassVar" in ast.unparse(each.annotation) else "settable"
            found[each.target.id] = kind
        elif isinstance(each, ast.FunctionDef):
            decorators = [ast.unparse(decorator) for decorator in each.decorator_list]
            if "property" in decorators:
                found[each.name] = "property"
            elif any(decorator.endswith(".setter") for decorator in decorators):
                found[each.name] = "settable"
            else:
                overloads = found.setdefault(each.name, [])
                assert isinstance(overloads, list)
                overloads.append(_parameters(each.args))
    return found


def from_bindings(module: str) -> dict[str, dict[str, Member]]:
    """What a module says of itself, in the docstrings that pybind11 makes."""
    tensorrt = importlib.import_module(module)
    return {name: _bound(getattr(tensorrt, name)) for name in named_classes()}


def _bound(cls: type) -> dict[str, Member]:
    found: dict[str, Member] = {}
    for name, member in inspect.getmembers(cls):
        if isinstance(member, property):
            found[name] = "property" if member.fset is None else "settable"
        elif not name.startswith("__") and not callable(member):
            found[name] = "value"
        elif callable(member) and not isinstance(member, type):
            overloads = _overloads(name, inspect.getdoc(member) or "")
            if overloads:
                found[name] = overloads
    return found


def _overloads(name: str, doc: str) -> list[list[str]]:
    """The parameters in lines such as ``1. parse(self: T, model: Buffer, path: str = None)``."""
    lines = re.findall(rf"^(?:\d+\. )?{name}\(self: (.*)\) -> ", doc, re.MULTILINE)
    return [[_parameter(part) for part in _split(line)[1:]] for line in lines]


def _split(line: str) -> list[str]:
    """Parts between commas that are in no brackets."""
    parts, depth = [""], 0
    for letter in line:
        depth += (letter in "[(<") - (letter in "])>")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _parameter(part: str) -> str:
    name = part.strip().partition(":")[0]
    return f"{name}=" if " = " in part else name


def _parameters(args: ast.arguments) -> list[str]:
    names = [arg.arg for arg in (*args.posonlyargs, *args.args)]
    first_default = len(names) - len(args.defaults)
    return [f"{name}=" if place >= first_default else name for place, name in enumerate(names)][1:]


def _counts(member: str) -> bool:
    return member[:2] != "__" or member in {"__init__", "__len__", "__getitem__"}


def _parsed(text: str) -> ast.Module:
    lines = text.split("\n")
    while True:
        try:
            return ast.parse("\n".join(lines))
        except SyntaxError as error:
            lines[(error.lineno or 1) - 1] = "    def left_out(self) -> None:"


def main(kind: str, source: str, output: str) -> None:
    """Write the list of a source to a file."""
    found = from_stubs(Path(source)) if kind == "stubs" else from_bindings(source)
    found = {
        name: {member: what for member, what in known.items() if _counts(member)}
        for name, known in found.items()
    }
    Path(output).parent.mkdir(exist_ok=True)
    Path(output).write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
