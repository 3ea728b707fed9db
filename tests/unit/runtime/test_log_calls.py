"""Every log call in the product has a constant event and field names from the list, checked in the source, not hoped for at run time."""

import ast
from collections.abc import Iterator
from pathlib import Path

from gpumesh_runtime.log_fields import FIELDS

ROOT = Path(__file__).parents[3]
SOURCES = ["libs/runtime/src", "libs/dispatch/src", "services", "node/src"]
METHODS = {"debug", "info", "warning", "error"}
SPECIAL = {"exc_info", "traceparent"}  # turned into error_type and traceback, trace_id and span_id


def log_calls(tree: ast.AST) -> Iterator[ast.Call]:
    """Calls such as log.info(...), self._log.error(...)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
            owner = node.func.value
            name = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
            if name.strip("_").lower() in {"log", "logger"}:
                yield node


def test_every_log_call_has_a_constant_event_and_allowed_fields() -> None:
    wrong, seen = [], 0
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for call in log_calls(ast.parse(path.read_text())):
                seen += 1
                where = f"{path.relative_to(ROOT)}:{call.lineno}"
                if not call.args or not isinstance(call.args[0], ast.Constant) or len(call.args) > 1:
                    wrong.append(f"{where}: the event must be one constant text")
                names = [
                    keyword.arg for keyword in call.keywords if keyword.arg
                ]  # **fields are checked at run time only
                wrong += [
                    f"{where}: field {name} is not in gpumesh_runtime.log_fields"
                    for name in names
                    if name not in FIELDS | SPECIAL
                ]
    assert seen > 10
    assert not wrong, "\n".join(wrong)
