"""``tests/<folder>/test_<module>.py`` is about ``attnrobust/<folder>/<module>.py``; what is not is named here."""

from pathlib import Path

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "attnrobust"
FREE = {"soundness", "contracts"}  # products of several modules

CROSS_CUTTING = {
    "test_demo.py",  # the demo's data and page
    "test_device.py",  # the same numbers on another device
    "test_docs.py",
    "test_examples.py",
    "test_mirror.py",
    "test_packaging.py",
    "test_strategies.py",  # of tests/strategies.py
}

# Modules that no file of their own tests. The list may only shrink: whoever writes the file deletes the line.
UNMIRRORED: set[str] = set()


def modules() -> set[str]:
    """Every module of the package by its path, packages and the entry point aside."""
    paths = (path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if not path.stem.startswith("__"))
    return {path.as_posix() for path in paths}


def mirrors() -> set[str]:
    """The module that each test file of a mirrored folder names."""
    paths = (path.relative_to(TESTS) for path in TESTS.rglob("test_*.py"))
    named = (path for path in paths if path.parts[0] not in FREE and path.as_posix() not in CROSS_CUTTING)
    return {path.with_name(path.name.removeprefix("test_")).as_posix() for path in named}


def test_every_test_file_is_named_after_a_module() -> None:
    assert mirrors() - modules() == set()


def test_every_module_has_its_test_file_or_is_listed() -> None:
    assert modules() - mirrors() - UNMIRRORED == set(), "write the test file"


def test_the_list_of_modules_without_a_file_only_shrinks() -> None:
    assert UNMIRRORED - modules() == set(), "no such module"
    assert mirrors() & UNMIRRORED == set(), "has its own file now"


def test_cross_cutting_files_exist() -> None:
    assert {name for name in CROSS_CUTTING if not (TESTS / name).exists()} == set()
