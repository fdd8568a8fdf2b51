"""From a configuration to a run on disk: what it means, what is left to do."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from attnrobust.certify import METHODS
from attnrobust.certify.contest import RULES
from attnrobust.errors import InputError
from attnrobust.runs.sources import inputs_digest
from attnrobust.runs.storage.files import versions
from attnrobust.runs.storage.store import Manifest
from attnrobust.runs.work import Workbench, WorkItem, model_digest


@dataclass(frozen=True)
class Shard:
    """One of ``count`` equal shares of the work; ``index`` counts from 0.

    Args:
        index: Which share.
        count: How many shares.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise InputError(f"shard {self.index + 1}/{self.count} does not exist; the first is 1/{self.count}")

    @property
    def name(self) -> str:
        """For files."""
        return "all" if self.count == 1 else f"{self.index + 1}-of-{self.count}"

    def of(self, items: Sequence[WorkItem]) -> list[WorkItem]:
        """This share of the items; it depends on their ids alone, so all shares together are all items."""
        ranks = {row_id: rank for rank, row_id in enumerate(sorted(item.row_id for item in items))}
        return [item for item in items if ranks[item.row_id] % self.count == self.index]


def parse_shard(text: str) -> Shard:
    """Read ``i/N``, i from 1 to N.

    Raises:
        InputError: Anything else.
    """
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal()):
        raise InputError(f"shard {text!r}: give i/N, as in 1/4")
    if int(count) == 0:
        raise InputError(f"shard {text!r}: there must be at least one shard")
    return Shard(int(index) - 1, int(count))


def shard_from_environment(environment: dict[str, str]) -> Shard:
    """The share of this process under torchrun (RANK, WORLD_SIZE) or srun (SLURM_PROCID, SLURM_NTASKS); else all."""
    for rank, size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if rank in environment and size in environment:
            try:
                return Shard(int(environment[rank]), int(environment[size]))
            except ValueError as error:
                raise InputError(
                    f"{rank}={environment[rank]} and {size}={environment[size]} must be numbers"
                ) from error
    return Shard()


def make_manifest(bench: Workbench, items: Sequence[WorkItem]) -> Manifest:
    """What the run of this configuration is; loads the model to read its weights.

    Args:
        bench: The configuration's workbench.
        items: Its whole work list.
    """
    config = bench.config
    return Manifest(
        meaning=meaning(bench),
        config=config.model_dump(mode="json"),
        rows=len(items),
        layers=list(bench.places),
        versions=versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def meaning(bench: Workbench) -> dict[str, Any]:
    """Everything that may change a number, by content: moved or renamed files mean the same."""
    config = bench.config
    named = config.named_certificates
    certificates = [method.name for method in METHODS] if named is None else list(named)
    if config.certificates is None:
        certificates = [*certificates, f"those that can win, by rules {RULES}"]
    attack = config.attack.model_dump(mode="json")
    if config.attack.epsilon is None:
        del attack["epsilon"]  # younger than the runs that are on disk
    if not config.attack.token_radii:
        del attack["token_radii"]  # the same
    return {
        "model": model_digest(bench.model),
        "inputs": inputs_digest(bench.sources),
        "layers": list(bench.places),
        "threats": list(bench.threats),
        "goals": [f"{goal.key} ({goal.digest})" for goal in bench.goals],
        "certificates": certificates,
        "attack": attack,
        "seed": config.seed,
        "device": config.device,
        "threads": config.threads,
    }
