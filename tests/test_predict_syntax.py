"""predict.py as Cog's static parser reads it: the schema is generated from the syntax tree, not by running the file."""

from __future__ import annotations

import ast

import pytest

from tests.paths import PROJECT

SOURCE = PROJECT / "predict.py"
PLAIN = {"str", "int", "float", "bool", "Path", "Secret"}


def predict_method(source: str) -> ast.FunctionDef:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name == "predict":
            return node
    raise AssertionError("no predict method")


def is_literal(node: ast.expr) -> bool:
    if isinstance(node, ast.List):
        return all(isinstance(element, ast.Constant) for element in node.elts)
    return isinstance(node, ast.Constant) or (isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant))


def plain_type(annotation: ast.expr) -> str:
    """Return the type's name, without Optional[...]; the parser knows no other form."""
    if isinstance(annotation, ast.Subscript) and isinstance(annotation.value, ast.Name):
        assert annotation.value.id == "Optional"
        assert isinstance(annotation.slice, ast.Name)
        return annotation.slice.id
    assert isinstance(annotation, ast.Name)
    return annotation.id


def faults(source: str) -> list[str]:
    """Return what Cog's parser would refuse or silently misread."""
    method = predict_method(source)
    arguments = method.args.args[1:]
    found = []
    if len(method.args.defaults) != len(arguments) or method.args.kwonlyargs or method.args.vararg or method.args.kwarg:
        found.append("every argument needs an Input(...) and must be an ordinary one")
    for argument, call in zip(arguments, method.args.defaults, strict=False):
        name = argument.arg
        if argument.annotation is None:
            found.append(f"{name}: no annotation")
            continue
        kind = plain_type(argument.annotation)
        if kind not in PLAIN:
            found.append(f"{name}: type {kind}")
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "Input"):
            found.append(f"{name}: not a plain Input(...) call")
            continue
        if call.args:
            found.append(f"{name}: positional arguments of Input are ignored")
        for keyword in call.keywords:
            if not is_literal(keyword.value):
                found.append(f"{name}: {keyword.arg} is not a literal")
            elif keyword.arg == "description" and _is_joined(source, keyword.value):
                found.append(f"{name}: the description is not one plain string")
            elif keyword.arg == "default" and ast.literal_eval(keyword.value) is None:
                found.append(f"{name}: default=None is published as a default, or makes a bare type required")
    return found


def _is_joined(source: str, node: ast.expr) -> bool:
    text = ast.get_source_segment(source, node) or ""
    return (
        not text.startswith('"')
        or "\n" in text
        or repr(ast.literal_eval(node))[1:-1].replace("\\'", "'") != text[1:-1].replace('\\"', '"')
    )


def test_predict_py_has_nothing_that_cogs_parser_misreads() -> None:
    assert faults(SOURCE.read_text()) == []


def test_the_output_is_a_list_of_paths() -> None:
    returns = predict_method(SOURCE.read_text()).returns
    assert returns is not None
    assert ast.unparse(returns) == "List[Path]"


HEAD = "class P:\n    def predict(self, "


@pytest.mark.parametrize(
    "argument",
    [
        "a: int = Input(default=None)",
        "a: Optional[int] = Input(default=None)",
        "a: int = Input(5)",
        "a: int = Input(default=FIVE)",
        "a: str = Input(default='x', choices=('x', 'y'))",
        "a: str = Input(default='x', choices=[c for c in 'xy'])",
        "a: str = Input(description='one ' 'two')",
        "a: str = Input(description=f'{1}')",
        "a: int = cog.Input(default=1)",
        "a: int = 1",
        "a: Thing = Input(default=1)",
        "a = Input(default=1)",
    ],
)
def test_each_trap_is_found(argument: str) -> None:
    assert faults(f"{HEAD}{argument}) -> str: ...") != []
