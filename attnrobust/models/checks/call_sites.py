"""How a module's parent calls it, from the parent's source: with one input for query, key and value, or with several.

Nothing is run. Where the source does not tell (no source, calls through another name), nothing is concluded; the
capture of a forward pass then compares the arguments themselves.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from functools import cache

from torch import nn

ARGUMENTS = ("query", "key", "value")
ACROSS = "the model calls it with a key or value that is not its query: cross attention is not modelled"


def is_called_across(model: nn.Module, name: str) -> bool:
    """Whether a parent's source calls the module ``name`` with a key or value that cannot be its query.

    Args:
        model: The model.
        name: Path of a module called as ``(query, key, value)``; in a ``ModuleList`` the list's owner is the parent.
    """
    place = _place(model, name)
    return place is not None and _class_calls_across(*place)


def is_called_with(model: nn.Module, name: str, arguments: tuple[str, ...]) -> bool:
    """Whether a parent's source gives the module ``name`` one of the named arguments, as another value than None."""
    place = _place(model, name)
    return place is not None and _class_gives(*place, arguments)


def _place(model: nn.Module, name: str) -> tuple[type, str] | None:
    """The class of a module's parent and the attribute that the module, or the list around it, is there."""
    path = name.split(".")
    while len(path) > 1 and path[-1].isdecimal():
        path.pop()
    if not path[-1] or path[-1].isdecimal():
        return None
    return type(model.get_submodule(".".join(path[:-1]))), path[-1]


@cache
def _class_calls_across(owner: type, attribute: str) -> bool:
    for ancestor in owner.__mro__:
        if ancestor is nn.Module:
            break
        found = [across for function in _methods(ancestor) for across in _calls(function, attribute)]
        if found:
            return any(found)
    return False


@cache
def _class_gives(owner: type, attribute: str, arguments: tuple[str, ...]) -> bool:
    return any(
        keyword.arg in arguments and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is None)
        for ancestor in owner.__mro__
        if ancestor is not nn.Module
        for function in _methods(ancestor)
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and _is_callee(node.func, attribute, set(_loop_names(function, attribute)))
        for keyword in node.keywords
    )


def _methods(owner: type) -> Iterator[ast.AST]:
    for value in vars(owner).values():
        function = inspect.unwrap(value) if isinstance(value, Callable) else None  # type: ignore[arg-type]
        if inspect.isfunction(function):
            try:
                yield ast.parse(textwrap.dedent(inspect.getsource(function)))
            except (OSError, TypeError, SyntaxError):  # no source, or none that stands alone
                continue


def _calls(function: ast.AST, attribute: str) -> Iterator[bool]:
    """For each call of ``self.attribute`` with readable arguments: whether key or value cannot be the query."""
    names, assigned = set(_loop_names(function, attribute)), _assigned(function)
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and _is_callee(node.func, attribute, names):
            given = _arguments(node)
            if given is not None:
                query, *others = (_may_be(argument, assigned) for argument in given)
                yield any(not query & other for other in others)


def _assigned(function: ast.AST) -> dict[str, list[ast.expr]]:
    """What is assigned to each name."""
    found: dict[str, list[ast.expr]] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    found.setdefault(target.id, []).append(node.value)
    return found


def _may_be(value: ast.expr, assigned: dict[str, list[ast.expr]], depth: int = 4) -> frozenset[str]:
    """The expressions whose value an argument may have, itself included; names of one value give the same one."""
    if isinstance(value, ast.IfExp):
        return _may_be(value.body, assigned, depth) | _may_be(value.orelse, assigned, depth)
    sources = assigned.get(value.id, []) if isinstance(value, ast.Name) and depth else []
    return frozenset({ast.dump(value)}).union(*(_may_be(source, assigned, depth - 1) for source in sources))


def _is_callee(node: ast.expr, attribute: str, names: set[str]) -> bool:
    if isinstance(node, ast.Subscript):
        node = node.value
    return _is_own(node, attribute) or (isinstance(node, ast.Name) and node.id in names)


def _is_own(node: ast.expr, attribute: str) -> bool:
    own = isinstance(node, ast.Attribute) and node.attr == attribute
    return own and isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"


def _arguments(call: ast.Call) -> tuple[ast.expr, ...] | None:
    """Query, key and value of a call, or None where they are not written one by one."""
    named = {keyword.arg: keyword.value for keyword in call.keywords}
    if None in named or any(isinstance(argument, ast.Starred) for argument in call.args):
        return None
    given = [call.args[i] if i < len(call.args) else named.get(name) for i, name in enumerate(ARGUMENTS)]
    return None if any(argument is None for argument in given) else tuple(a for a in given if a is not None)


def _loop_names(function: ast.AST, attribute: str) -> Iterator[str]:
    """Names that stand for ``self.attribute`` or an element of it: ``for a in self.list``, with enumerate or zip."""
    for node in ast.walk(function):
        if isinstance(node, ast.For | ast.comprehension):
            yield from _bound(node.target, node.iter, attribute)
        elif isinstance(node, ast.Assign) and _is_callee(node.value, attribute, set()):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def _bound(target: ast.expr, source: ast.expr, attribute: str) -> Iterator[str]:
    if isinstance(target, ast.Name) and _is_own(source, attribute):
        yield target.id
    elif isinstance(target, ast.Tuple) and isinstance(source, ast.Call) and isinstance(source.func, ast.Name):
        shift = {"enumerate": 1, "zip": 0}.get(source.func.id)
        if shift is not None:
            for part, element in zip(target.elts[shift:], source.args, strict=False):
                yield from _bound(part, element, attribute)
