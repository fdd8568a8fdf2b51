"""The run configuration: one checked document, from a file, flags, or both."""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from attnrobust.errors import AttnRobustError, InputError
from attnrobust.runs.early import KINDS as INPUTS
from attnrobust.runs.early import refuse_unknown_names, require_input
from attnrobust.runs.reading import (
    ATTACKS,
    CERTIFICATES,
    DEFAULT_ATTACK,
    DEFAULT_DEPTH,
    DEFAULT_TOLERANCE,
    NETWORK_GOALS,
    is_known_move,
    read_anchors,
    require_goal_options,
)

if TYPE_CHECKING:
    from attnrobust.attacks import AttackBudget
    from attnrobust.goals import Goal
    from attnrobust.runs.networks import NetworkGoal

DEFAULT_OUTPUT = "attnrobust-run"
ALL_CERTIFICATES = "all"
"""In place of names: every certificate that applies, also those that cannot win."""
SMALLEST_SEED, LARGEST_SEED = -(2**63), 2**63 - 1
"""Seeds are stored as signed 64-bit integers."""


def _listed(value: Any) -> Any:
    """One value where a list is meant."""
    return value if value is None or isinstance(value, list | tuple) else (value,)


def _text(value: Any) -> Any:
    """Numbers where a text is meant (``tolerance: 0.5`` in YAML)."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _goals(value: Any) -> Any:
    """A goal may be a tolerance alone, or the name of a goal of a whole model."""
    goals = _listed(value)
    return goals if goals is None else tuple(map(_goal, goals))


def _goal(value: Any) -> Any:
    if isinstance(value, Mapping | BaseModel):
        return value
    return {"goal" if value in NETWORK_GOALS else "tolerance": value}


Names = Annotated[tuple[str, ...], BeforeValidator(_listed)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class GoalConfig(_Section):
    """One goal: a tolerance, or a readout file whose label must stay (see ``attnrobust.runs.inputs.make_goal``).

    With ``goal`` it is about the whole model from a depth on (see ``attnrobust.runs.networks``).
    """

    goal: str | None = None
    tolerance: Annotated[str | None, BeforeValidator(_text)] = None
    readout: Path | None = None
    pool: str | None = None
    label: int | None = Field(default=None, ge=0)
    anchors: Path | None = None
    row: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _default(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("goal") in ("decision", "nearest"):
            return values
        nothing = values.get("tolerance") is None and values.get("readout") is None
        return values | {"tolerance": DEFAULT_TOLERANCE} if nothing else values

    def check(self) -> None:
        """Refuse what cannot be read; only a readout's file needs torch."""
        require_goal_options(**dict(self))
        if self.readout is not None:
            require_input("readout", self.readout)
            self.make()
        if self.anchors is not None:
            read_anchors(self.anchors)

    def make(self) -> "Goal | NetworkGoal":
        """The goal itself; reads the readout file or the anchors."""
        if self.goal is not None:
            from attnrobust.runs.networks import NetworkGoal

            anchors = () if self.anchors is None else read_anchors(self.anchors)
            return NetworkGoal(self.goal, tolerance=self.tolerance, row=self.row, label=self.label, anchors=anchors)
        from attnrobust.runs.inputs import make_goal

        return make_goal(tolerance=self.tolerance, readout=self.readout, pool=self.pool, label=self.label)


class AttackConfig(_Section):
    """The attack and its cost; ``method`` null runs certificates alone.

    ``epsilon`` null searches the smallest radius; a number fixes the budget and asks for the worst point within it.
    ``token_radii`` also attacks every token alone, all in one short batched search, for the report's heat map.
    """

    method: str | None = DEFAULT_ATTACK
    restarts: int = Field(default=8, ge=1)
    steps: int = Field(default=60, ge=1)
    queries: int | None = Field(default=None, ge=1)
    seconds: float | None = Field(default=None, gt=0)
    epsilon: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    token_radii: bool = False

    def budget(self) -> "AttackBudget":
        """What one input may cost."""
        from attnrobust.attacks import AttackBudget

        return AttackBudget(restarts=self.restarts, steps=self.steps, queries=self.queries, seconds=self.seconds)


class ExecutionConfig(_Section):
    """How the work is done; nothing here changes a number in a row.

    ``workers`` 0 works in this process; ``timeout`` (seconds a row) needs workers, because only a process can be ended.
    """

    engine: Literal["local", "ray"] = "local"
    workers: int = Field(default=0, ge=0)
    timeout: float | None = Field(default=None, gt=0)
    num_gpus: float = Field(default=0.0, ge=0)
    part_rows: int = Field(default=64, ge=1)
    part_seconds: float = Field(default=20.0, gt=0)

    @model_validator(mode="after")
    def _timeout_needs_workers(self) -> "ExecutionConfig":
        if self.timeout is not None and self.engine == "local" and self.workers == 0:
            raise ValueError("a timeout needs worker processes; set workers to 1 or more")
        return self


class RunConfig(_Section):
    """What to compute: every input on every layer under every threat and goal.

    ``certificates`` null means those that apply and can have the largest radius (where the attack finds a violation),
    ``all`` every one that applies, an empty list none. ``layers`` takes names, unique suffixes and globs;
    null means the model's only layer. ``at`` takes depths and globs of them instead: then the rows are about the whole
    model, whose tokens move there, and so is every goal. ``column`` is the one of ``dataset`` that has the texts.
    """

    model: str
    layers: Annotated[tuple[str, ...] | None, BeforeValidator(_listed)] = ("*",)
    at: Annotated[tuple[str, ...] | None, BeforeValidator(_listed)] = None
    texts: Path | None = None
    tokens: Path | None = None
    images: Path | None = None
    dataset: Path | None = None
    column: str | None = None
    threats: Names = ("frobenius",)
    goals: Annotated[tuple[GoalConfig, ...], BeforeValidator(_goals)] = (GoalConfig(),)
    certificates: Annotated[tuple[str, ...] | None, BeforeValidator(_listed)] = None
    attack: AttackConfig = AttackConfig()
    seed: int = Field(default=0, ge=SMALLEST_SEED, le=LARGEST_SEED)
    device: str = "cpu"
    threads: int = Field(default=1, ge=1)
    output: Path = Path(DEFAULT_OUTPUT)
    execution: ExecutionConfig = ExecutionConfig()

    @model_validator(mode="before")
    @classmethod
    def _layers_or_depths(cls, values: Any) -> Any:
        """A goal about the whole model has a depth, and no layers; without one it is at the embeddings."""
        if not isinstance(values, dict):
            return values
        whole = values.get("at") is not None or _any_network_goal(values.get("goals"))
        if whole and values.get("layers") is not None:
            raise ValueError(
                "layers (--layer) and at or goal (--at, --goal) exclude each other: name attention layers, or the "
                "depth from which on the whole model is asked about"
            )
        if not whole:
            return values
        return values | {"layers": None, "at": DEFAULT_DEPTH if values.get("at") is None else values["at"]}

    @model_validator(mode="after")
    def _goals_of_one_sort(self) -> "RunConfig":
        if self.at is None:
            return self
        if any(goal.goal is None for goal in self.goals):
            raise ValueError(
                f"every goal at a depth is one of {', '.join(NETWORK_GOALS)} (--goal); name layers (--layer) for a "
                "tolerance or a readout of a layer"
            )
        if self.tokens is not None:
            raise ValueError("tokens of a file cannot be compared with the model's own states; give texts or images")
        return self

    @model_validator(mode="after")
    def _something_to_do(self) -> "RunConfig":
        if sum(getattr(self, name) is not None for name in INPUTS) != 1:
            raise ValueError("give the inputs by exactly one of texts, tokens, images and dataset")
        if self.column is not None and self.dataset is None:
            raise ValueError("a column is one of a dataset; give --dataset too, or leave --column out")
        for name in ("layers", "at", "threats", "goals"):
            if getattr(self, name) == ():
                raise ValueError(f"{name} is empty; name at least one")
        if self.certificates == () and self.attack.method is None:
            raise ValueError("no certificate and no attack: there is nothing to do")
        return self

    def check_names(self) -> "RunConfig":
        """Refuse unknown threats, goals, certificates and attacks before any model is loaded.

        Torch is imported only for what ``attnrobust.runs.reading`` does not know.
        """
        names = self.named_certificates or ()
        refuse_unknown_names(threats=self.threats, certificates=names, attack=self.attack.method)
        if self.device != "cpu":
            from attnrobust.runs.inputs import parse_device

            parse_device(self.device)
        for goal in self.goals:
            goal.check()
        listed = CERTIFICATES.issuperset(names) and self.attack.method in {None, *ATTACKS}
        if not (listed and all(map(is_known_move, self.threats))):
            from attnrobust.runs.inputs import require_methods

            require_methods(self.threats, certificates=names, attack=self.attack.method)
        return self

    @property
    def certifies(self) -> bool:
        """Whether certificates are run."""
        return self.certificates != ()

    @property
    def named_certificates(self) -> tuple[str, ...] | None:
        """Those that are run whatever comes out of others; None where none is named."""
        return None if self.certificates in (None, (ALL_CERTIFICATES,)) else self.certificates

    def as_yaml(self) -> str:
        """The effective configuration, as a file that gives the same one back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _any_network_goal(goals: Any) -> bool:
    found = _goals(goals) or ()
    return any((goal.get("goal") if isinstance(goal, Mapping) else goal.goal) is not None for goal in found)


def load_config(path: Path | None = None, *, changes: Mapping[str, Any] | None = None) -> RunConfig:
    """Read a configuration file and put the changes (flags) over it.

    Args:
        path: YAML or JSON; relative paths in it are relative to its directory. None starts from the defaults.
        changes: Nested values; None entries are left out, sections are merged key by key.

    Returns:
        The effective configuration, paths absolute.

    Raises:
        InputError: No such file, not YAML, unknown keys (names the nearest), values out of range.
    """
    values = _anchored({"output": DEFAULT_OUTPUT}, Path())
    values |= {} if path is None else _anchored(_read(path), path.parent)
    given = _anchored(_pruned(changes or {}), Path())
    for kinds in (INPUTS, ("layers", "at")):
        if any(kind in given for kind in kinds):  # a flag replaces the other kinds of input or place in the file
            values = {key: value for key, value in values.items() if key not in kinds or key in given}
            if "dataset" not in values:
                values.pop("column", None)
    return make_config(_merged(values, given), source=path)


def make_config(values: Mapping[str, Any], *, source: Path | None = None) -> RunConfig:
    """Check plain values; see ``load_config``."""
    try:
        return RunConfig(**values).check_names()
    except ValidationError as error:
        raise InputError(_explained(error, source)) from error
    except AttnRobustError as error:
        if source is None:
            raise
        raise InputError(f"{source}: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read the configuration {path}: {getattr(error, 'strerror', None) or error}"
        ) from error
    try:
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{path} is not valid: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InputError(f"{path} must hold keys and values, as 'attnrobust config --print' shows them")
    return values


def _anchored(values: dict[str, Any], base: Path) -> dict[str, Any]:
    """Paths made absolute from ``base``."""
    out = dict(values)
    for key in (*INPUTS, "output"):
        if isinstance(out.get(key), str | Path):
            out[key] = _absolute(base, out[key])
    if isinstance(out.get("goals"), list | tuple | dict):
        goals = out["goals"] if isinstance(out["goals"], list | tuple) else [out["goals"]]
        out["goals"] = [_anchored_goal(goal, base) for goal in goals]
    return out


def _anchored_goal(goal: Any, base: Path) -> Any:
    if not isinstance(goal, dict):
        return goal
    files = {name: goal[name] for name in ("readout", "anchors") if isinstance(goal.get(name), str | Path)}
    return goal | {name: _absolute(base, path) for name, path in files.items()}


def _absolute(base: Path, path: str | Path) -> str:
    """The path from ``base``; links are followed only where that is what ``..`` means."""
    found = (base / Path(path).expanduser()).absolute()
    return str(found.resolve() if ".." in found.parts else found)


def _pruned(values: Mapping[str, Any]) -> dict[str, Any]:
    pruned = {k: _pruned(v) if isinstance(v, Mapping) else v for k, v in values.items() if v is not None}
    return {k: v for k, v in pruned.items() if v != {}}


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = _merged(out[key], value) if both else value
    return out


def _explained(error: ValidationError, source: Path | None) -> str:
    """The first thing that is wrong, in one line; unknown keys with the nearest known ones."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _keys_at(first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=3, cutoff=0.6)
        what = f"unknown key {place}; " + (
            f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
        )
    elif first["type"] == "missing":
        what = f"{place} is missing"
    else:
        message = str(first["msg"]).removeprefix("Value error, ")
        what = f"{place}: {message}" if place else message
    return what if source is None else f"{source}: {what}"


def _keys_at(place: tuple[int | str, ...]) -> list[str]:
    sections: dict[str, type[BaseModel]] = {"goals": GoalConfig, "attack": AttackConfig, "execution": ExecutionConfig}
    section = sections.get(str(place[0]), RunConfig) if place else RunConfig
    return list(section.model_fields)
