"""Several attacks over the same inputs: one run on disk for each, and who wins where."""

import re
import statistics
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from attnrobust.attacks import check_attack_name
from attnrobust.errors import InputError
from attnrobust.notebook import Shown, html_table
from attnrobust.runs.config import RunConfig, make_config
from attnrobust.runs.rows import Row, median
from attnrobust.runs.run import Watcher, run
from attnrobust.status import Status
from attnrobust.text import rounded

TIE = 1e-6
"""Radii that differ by less than this share count as equal: the verified ones are polished to 1e-9."""

FACTORS = (1.1, 1.5, 2.0)
"""Where success is counted beside 1, in median best known radii."""

Budgets = Mapping[str, Mapping[str, int | float]]
"""Of an attack by its name: any of restarts, steps, queries, seconds; they go over those of the configuration."""


@dataclass(frozen=True)
class AttackScore:
    """One attack over the inputs of one layer, threat and goal. Radii are in the threat's distance.

    Args:
        layer: The layer's name.
        threat: The threat's key.
        goal: The goal's key.
        attack: The attack's name.
        rows: Inputs that it was run on and whose goal holds at the clean input.
        found: Inputs with a verified violation.
        wins: Inputs where no other attack has a smaller radius (ties count for each, an input without any radius for
            none).
        success: Share of the rows with a radius of at most epsilon, for every epsilon.
        median_radius: Median over the rows, a row without violation counts as infinite; None if that is the median.
        optimality: Median of best known radius / its radius, over the rows where any attack has one; 0 without
            violation.
        worst_optimality: The smallest of these.
        queries: Median forward evaluations of one input.
        seconds: Median wall time of one input.
        statuses: How many rows ended how.
    """

    layer: str
    threat: str
    goal: str
    attack: str
    rows: int
    found: int
    wins: int
    success: Mapping[float, float]
    median_radius: float | None
    optimality: float | None
    worst_optimality: float | None
    queries: float | None
    seconds: float | None
    statuses: Mapping[str, int]


@dataclass(frozen=True)
class InputWinner:
    """The radii of one input.

    Args:
        input_id: The input's name.
        layer: The layer's name.
        threat: The threat's key.
        goal: The goal's key.
        radii: Radius of every attack; None where it found no violation.
        best: The smallest radius, or None.
        winners: The attacks that reach it.
    """

    input_id: str
    layer: str
    threat: str
    goal: str
    radii: Mapping[str, float | None]
    best: float | None
    winners: tuple[str, ...]


@dataclass(frozen=True, eq=False, repr=False)
class Benchmark(Shown):
    """What ``bench`` computed.

    Args:
        attacks: The attacks' names.
        rows: The rows on disk of every attack.
        remaining: Rows that are still to do.
    """

    attacks: tuple[str, ...]
    rows: Mapping[str, tuple[Row, ...]]
    remaining: int

    def scores(self, epsilons: Sequence[float] | None = None) -> tuple[AttackScore, ...]:
        """Every attack over every layer, threat and goal.

        Args:
            epsilons: Where success is counted; None takes 1, 1.1, 1.5 and 2 times the median best known radius of each
                layer, threat and goal.
        """
        scores = []
        winners = self.winners()
        for key in dict.fromkeys((row.layer, row.threat, row.goal) for rows in self.rows.values() for row in rows):
            inputs = [w for w in winners if (w.layer, w.threat, w.goal) == key]
            chosen = tuple(epsilons) if epsilons is not None else default_epsilons(inputs)
            for attack in self.attacks:
                rows = [row for row in self.rows[attack] if (row.layer, row.threat, row.goal) == key]
                scores.append(_score(attack, key, rows, inputs, chosen))
        return tuple(scores)

    def to_dict(self, epsilons: Sequence[float] | None = None) -> dict[str, Any]:
        """Plain values, as for JSON: scores (see ``scores``), and the radii input by input."""
        scores = self.scores(epsilons)
        return {
            "attacks": list(self.attacks),
            "remaining": self.remaining,
            "scores": [asdict(s) | {"success": _shares(s)} for s in scores],
            "inputs": [asdict(winner) | {"winners": list(winner.winners)} for winner in self.winners()],
        }

    def records(self) -> list[dict[str, Any]]:
        """One line for each attack, layer, threat and goal: its score without the shares and statuses."""
        return [{k: v for k, v in asdict(s).items() if not isinstance(v, dict)} for s in self.scores()]

    def summary(self) -> str:
        """How many inputs each attack wins."""
        winners = self.winners()
        wins = ", ".join(f"{name} {sum(name in one.winners for one in winners)}" for name in self.attacks)
        left = f"; {self.remaining} rows are left" if self.remaining else ""
        return f"Benchmark: smallest radius among {len(winners)} inputs: {wins}{left}"

    def __repr__(self) -> str:
        """One line."""
        return f"<{self.summary()}>"

    def _repr_html_(self) -> str:
        """The scores as a table for a notebook."""
        return f"<p>{escape(self.summary())}</p>{html_table(self.records())}"

    def winners(self) -> tuple[InputWinner, ...]:
        """Input by input the radii of all attacks; inputs whose goal fails without any move are left out."""
        by_id: dict[str, dict[str, Row]] = {}
        for attack in self.attacks:
            for row in self.rows[attack]:
                by_id.setdefault(str(row.row_id), {})[attack] = row
        return tuple(
            _winner(of_input)
            for of_input in by_id.values()
            if not any(row.status == Status.MISCLASSIFIED for row in of_input.values())
        )


def bench(
    config: RunConfig,
    attacks: Sequence[str] | str,
    *,
    budgets: Budgets | None = None,
    stop: threading.Event | None = None,
    watch: Watcher | None = None,
) -> Benchmark:
    """Run several attacks over everything that a configuration names, without certificates.

    Every attack has a run of its own in a directory below the configuration's output, named after it. What is on disk
    is not computed again: the same call goes on after an interruption, and one more attack costs only its own rows.

    Args:
        config: Inputs, layers, threats, goals, budget and output; its certificates and its attack's name are ignored.
        attacks: Names that ``attack_named`` knows, or one name.
        budgets: Budgets of single attacks.
        stop: Once set, the running row is finished and the call returns.
        watch: Sees the rows of each attack as they come.

    Returns:
        All rows on disk.

    Raises:
        UnknownNameError: An attack that does not exist.
        InputError: No attack, one named twice, a budget of an attack that is not run, or what ``run`` raises (a
            directory that holds a run with other inputs or another budget).
    """
    attacks = (attacks,) if isinstance(attacks, str) else attacks
    configs = [attack_config(config, attack, (budgets or {}).get(attack, {})) for attack in _checked(attacks, budgets)]
    stop = threading.Event() if stop is None else stop
    outcomes = [run(each, stop=stop, watch=watch) for each in configs]
    rows = {name: tuple(o.store.rows()) for name, o in zip(attacks, outcomes, strict=True)}
    return Benchmark(tuple(attacks), rows, sum(o.remaining for o in outcomes))


def attack_config(config: RunConfig, attack: str, budget: Mapping[str, int | float]) -> RunConfig:
    """The run of one attack; its output is a directory below that of the benchmark."""
    values: dict[str, Any] = config.model_dump(mode="json")
    values["attack"] = values["attack"] | {"method": attack} | dict(budget)
    values["certificates"] = []
    values["output"] = str(config.output / re.sub(r"[^A-Za-z0-9._-]+", "-", attack))
    return make_config(values)


def default_epsilons(inputs: Iterable[InputWinner]) -> tuple[float, ...]:
    """1, 1.1, 1.5 and 2 times the median best known radius, to four digits; none where nothing was found.

    The first is rounded up: below the median it would leave out the median input itself.
    """
    best = [winner.best for winner in inputs if winner.best]
    middle = statistics.median(best) if best else 0.0
    return (rounded(middle, up=True, digits=4), *(float(f"{f * middle:.4g}") for f in FACTORS)) if best else ()


def _shares(score: AttackScore) -> list[dict[str, float]]:
    return [{"epsilon": epsilon, "share": share} for epsilon, share in score.success.items()]


def _checked(attacks: Sequence[str], budgets: Budgets | None) -> Sequence[str]:
    if not attacks:
        raise InputError("name at least one attack, as in --attacks token-moving,foolbox:DDN")
    for number, name in enumerate(attacks):
        check_attack_name(name)
        if name in attacks[:number]:
            raise InputError(f"attack {name} is named twice")
    if foreign := sorted(set(budgets or {}) - set(attacks)):
        raise InputError(f"a budget is given for {foreign[0]}, which is not among the attacks {', '.join(attacks)}")
    return attacks


def _winner(rows: Mapping[str, Row]) -> InputWinner:
    radii = {name: row.attack_radius for name, row in rows.items()}
    best = min((radius for radius in radii.values() if radius is not None), default=None)
    first = next(iter(rows.values()))
    winners = tuple(n for n, r in radii.items() if r is not None and best is not None and r <= best * (1.0 + TIE))
    return InputWinner(first.input_id, first.layer, first.threat, first.goal, radii, best, winners)


def _score(
    attack: str,
    key: tuple[str, str, str],
    rows: Sequence[Row],
    inputs: Sequence[InputWinner],
    epsilons: Sequence[float],
) -> AttackScore:
    tried = [winner for winner in inputs if attack in winner.radii]
    radii = [float("inf") if (r := winner.radii[attack]) is None else r for winner in tried]
    shares = [_share(w.best, r) for w, r in zip(tried, radii, strict=True) if w.best is not None]
    middle = statistics.median_low(radii) if radii else float("inf")
    there = [row for row in rows if row.status != Status.MISCLASSIFIED]
    statuses = sorted({str(row.status) for row in rows})
    return AttackScore(
        *key,
        attack=attack,
        rows=len(tried),
        found=sum(r < float("inf") for r in radii),
        wins=sum(attack in winner.winners for winner in tried),
        success={e: sum(r <= e for r in radii) / len(radii) for e in epsilons} if radii else {},
        median_radius=middle if middle < float("inf") else None,
        optimality=statistics.median(shares) if shares else None,
        worst_optimality=min(shares, default=None),
        queries=median(row.queries for row in there),
        seconds=median(row.seconds_attack for row in there),
        statuses={status: sum(str(row.status) == status for row in rows) for status in statuses},
    )


def _share(best: float, radius: float) -> float:
    return 1.0 if radius == best else best / radius
