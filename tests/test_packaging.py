"""What is shipped: names, versions, pins, the wheel, and how much is imported before it is needed."""

import ast
import importlib.metadata
import inspect
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

import attnrobust

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
HEAVY = ("transformers", "foolbox", "cvxpy", "matplotlib", "pyarrow", "ot", "flint", "ray", "jinja2")


def python(*arguments: str, **environment: str) -> str:
    """Run a fresh interpreter without the tests' import hook; raise with its whole output if it fails."""
    run = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


# ---- syntax and imports ---------------------------------------------------------------------------------------------


SOURCES = sorted((ROOT / "attnrobust").rglob("*.py"))
POSIX_ONLY = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}


def test_the_source_is_the_syntax_of_the_oldest_python() -> None:
    """Later versions of Python only add syntax: what parses as the oldest one is that of all that follow."""
    assert PROJECT["project"]["requires-python"] == ">=3.11"
    for path in SOURCES:
        ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, 11))


def test_no_module_needs_a_posix_system_to_be_imported() -> None:
    for path in SOURCES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not POSIX_ONLY & {name.partition(".")[0] for name in names}, path


# ---- names ---------------------------------------------------------------------------------------------------------


def test_every_public_name_exists_once_and_is_documented() -> None:
    assert len(set(attnrobust.__all__)) == len(attnrobust.__all__)
    for name in attnrobust.__all__:
        value = getattr(attnrobust, name)
        assert name == "__version__" or inspect.getdoc(value), name


def test_type_checkers_see_the_names_that_the_package_has() -> None:
    """Below TYPE_CHECKING stands for them what __getattr__ finds."""
    (block,) = [
        node for node in ast.parse((ROOT / "attnrobust" / "__init__.py").read_text()).body if isinstance(node, ast.If)
    ]
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == attnrobust._HOME
    assert {*seen, "__version__"} == set(attnrobust.__all__) == set(dir(attnrobust))


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'certifi'"):
        attnrobust.certifi  # noqa: B018


@pytest.mark.parametrize(
    "order",
    [
        "import attnrobust as ar; f = ar.certify; import attnrobust.certify.registry",
        "import attnrobust.certify.registry; import attnrobust as ar; f = ar.certify",
        "from attnrobust import certify as f; import attnrobust as ar",
        "import attnrobust as ar; ar.bounds_table; f = ar.certify",
    ],
)
def test_certify_is_a_function_and_a_package_in_every_order(order: str) -> None:
    program = f"""
{order}
import pickle
import attnrobust.certify.registry
import torch
layer = ar.Attention(*(torch.eye(2)[None] for _ in range(3)))
problem = ar.Problem(layer, ar.TokenMeasure(torch.eye(2)), ar.FrobeniusBall(), ar.Displacement(0.5))
for call in (f, ar.certify, pickle.loads(pickle.dumps(ar.certify)), ar.certify.certify):
    (one,) = call(problem, methods="displacement").certificates
    print(one.method, len(ar.certify.registry.METHODS) > 3)
"""
    assert python("-c", program).splitlines() == ["displacement True"] * 4


# ---- what is imported ----------------------------------------------------------------------------------------------


def loaded_by(statement: str) -> set[str]:
    return set(python("-c", f"{statement}; import sys; print(*sys.modules)").split())


def test_heavy_libraries_are_not_imported_before_they_are_needed() -> None:
    assert sorted(loaded_by("import attnrobust") & {"torch", "numpy", *HEAVY}) == []
    names = loaded_by("import attnrobust; attnrobust.certify")
    assert "torch" in names
    assert sorted(names & set(HEAVY)) == []


def test_python_m_runs_the_command_and_its_help_needs_no_heavy_library() -> None:
    program = """
import runpy, sys
sys.argv = ["attnrobust", "--help"]
try:
    runpy.run_module("attnrobust", run_name="__main__")
except SystemExit as end:
    print("code", end.code, "loaded", *sys.modules)
"""
    text, _, loaded = python("-c", program).rpartition("loaded ")
    assert "compare" in text
    assert text.rstrip().endswith(("code 0", "code None"))
    assert sorted(set(loaded.split()) & set(HEAVY)) == []


# ---- metadata ------------------------------------------------------------------------------------------------------


def test_one_version_everywhere() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == attnrobust.__version__


def test_every_dependency_says_what_it_is_for() -> None:
    block = (ROOT / "pyproject.toml").read_text().split("dependencies = [", 1)[1].split("\n]", 1)[0]
    lines = [line for line in block.splitlines() if line.strip()]
    assert len(lines) == len(PROJECT["project"]["dependencies"])
    for line in lines:
        assert re.search(r'",\s+# \w', line), line


def requirements(*extras: str) -> list[Requirement]:
    listed = PROJECT["project"]["dependencies"] + [
        line for extra in extras for line in PROJECT["project"]["optional-dependencies"][extra]
    ]
    return [Requirement(line) for line in listed if not line.startswith("attnrobust[")]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pair) == 2 for pair in pairs), "every line is name==version"
    return {name.lower().replace("_", "-"): version for name, version in pairs}


def test_every_requirement_is_pinned_to_a_version_that_it_admits() -> None:
    pinned = pins()
    for requirement in requirements("demo", "rigorous", "test"):
        version = pinned[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(version, prereleases=True), requirement


def test_torch_is_pinned_without_a_local_version() -> None:
    """``2.13.0+cpu`` would refuse every other build of the same release."""
    assert pins()["torch"] == "2.13.0"
    assert not [version for version in pins().values() if "+" in version]


def test_the_tests_run_with_the_pinned_versions() -> None:
    if not (ROOT / ".venv").exists() or not Path(sys.executable).is_relative_to(ROOT / ".venv"):
        pytest.skip("not in the environment that make test creates")
    pinned = pins()
    for requirement in requirements("demo", "rigorous", "test"):
        installed = importlib.metadata.version(requirement.name).partition("+")[0]
        assert installed == pinned[requirement.name.lower().replace("_", "-")], requirement.name


def test_slow_tests_are_left_out_by_default() -> None:
    assert "not slow" in PROJECT["tool"]["pytest"]["addopts"]
    assert PROJECT["tool"]["pytest"]["filterwarnings"][0] == "error"


# ---- the wheel -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    python("-m", "build", "--wheel", "--no-isolation", "--outdir", str(directory), str(ROOT))
    (built,) = directory.glob("*.whl")
    return built


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    tracked = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "attnrobust").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in held if not re.match(r"attnrobust-[^/]*\.dist-info/", name)} == tracked
    assert "attnrobust/py.typed" in held
    assert "attnrobust/demo/sentences.txt" in held
    assert any(name.endswith("licenses/LICENSE") for name in held)


def test_the_wheel_works_by_itself(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
        (entry_points,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert "attnrobust = attnrobust.cli:main" in archive.read(entry_points).decode()
    program = (
        "import attnrobust, attnrobust.cli, attnrobust.demo as d; print(attnrobust.__file__, len(d.demo_sentences()))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert run.stdout.split() == [str(tmp_path / "attnrobust" / "__init__.py"), "8"]
