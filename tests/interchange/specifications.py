"""VNN-LIB files, read as the standard says and evaluated without rounding."""

import re
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from torch import Tensor

Term = Any  # a word, or a list of terms


def terms(text: str) -> list[Term]:
    """The terms of a file of version 1.0 (the syntax of SMT-LIB); comments are left out."""
    words = re.findall(r"[()]|[^\s()]+", re.sub(r";[^\n]*", "", text))
    stack: list[list[Term]] = [[]]
    for word in words:
        if word == "(":
            stack.append([])
        elif word == ")":
            done = stack.pop()
            stack[-1].append(done)
        else:
            stack[-1].append(word)
    (found,) = stack
    return found


def assertions(text: str) -> tuple[list[Term], list[Term]]:
    """Those about inputs alone, and those about outputs."""
    found = [term[1] for term in terms(text) if term[0] == "assert"]
    about = [[term for term in found if ("Y_" in str(term)) is outputs] for outputs in (False, True)]
    return about[0], about[1]


def declared(text: str, letter: str) -> int:
    """How many variables of a letter are declared, numbered from 0."""
    names = [term[1] for term in terms(text) if term[0] == "declare-const" and term[1].startswith(f"{letter}_")]
    assert names == [f"{letter}_{i}" for i in range(len(names))]
    return len(names)


def values(**tensors: Tensor) -> dict[str, Fraction]:
    """Exact values of variables."""
    return {
        f"{letter}_{i}": Fraction(one)
        for letter, tensor in tensors.items()
        for i, one in enumerate(tensor.flatten().tolist())
    }


def holds(term: Term, given: Mapping[str, Fraction]) -> bool:
    """Whether a formula is true."""
    head, *rest = term
    if head in ("and", "or"):
        return (all if head == "and" else any)(holds(part, given) for part in rest)
    left, right = (given[word] if word in given else Fraction(word) for word in rest)
    return {"<=": left <= right, ">=": left >= right}[head]


def box(text: str) -> list[tuple[Fraction, Fraction]]:
    """The bounds of every input; each has exactly one of either sort."""
    bounds: dict[tuple[str, str], Fraction] = {}
    for operator, name, number in assertions(text)[0]:
        assert (operator, name) not in bounds
        bounds[operator, name] = Fraction(number)
    return [(bounds[">=", f"X_{i}"], bounds["<=", f"X_{i}"]) for i in range(declared(text, "X"))]


def satisfied(text: str, x: Tensor, y: Tensor) -> tuple[bool, bool]:
    """Whether the inputs are in the box, and whether the outputs break the goal."""
    given = values(X=x, Y=y)
    inputs, outputs = assertions(text)
    return all(holds(term, given) for term in inputs), all(holds(term, given) for term in outputs)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")
