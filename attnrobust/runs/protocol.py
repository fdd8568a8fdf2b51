"""The standard protocol: a fixed, versioned set of threats, goals, certificates, attacks and budgets, without options.

Numbers of two papers compare where protocol and inputs are the same. Whatever would change a number raises the version.
"""

import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from attnrobust.errors import InputError, UnknownNameError
from attnrobust.runs.config import RunConfig, make_config
from attnrobust.runs.run import Outcome, Watcher, run


@dataclass(frozen=True, kw_only=True)
class ProtocolAttack:
    """One attack and what it may cost on one input.

    Args:
        name: As ``attnrobust list attacks`` has it.
        restarts: Starting points.
        steps: Steps of a round.
    """

    name: str
    restarts: int
    steps: int


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is measured on every layer and input.

    Args:
        name: Its name.
        version: Raised with every change of anything below.
        threats: Keys of the threats.
        tolerances: Goals: the layer's output moves by at most this share of its norm.
        certificates: Their names; one that does not apply to a layer is left out there.
        attacks: Attacks, each on every threat; seconds are not limited, because they depend on the machine.
        seed: Of everything random.
        device: Where it is computed.
        sizes: Where certified, undecided and broken inputs are counted, as shares of the norm that the threat's radii
            are compared with (``attnrobust.runs.yardsticks``).
    """

    name: str
    version: int
    threats: tuple[str, ...]
    tolerances: tuple[str, ...]
    certificates: tuple[str, ...]
    attacks: tuple[ProtocolAttack, ...]
    seed: int
    device: str
    sizes: tuple[float, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values as JSON has them."""
        return {key: _plain(value) for key, value in asdict(self).items()}


STANDARD = Protocol(
    name="standard",
    version=1,
    threats=("frobenius", "per-token", "any-token"),
    tolerances=("10%",),
    certificates=(
        "castin2024-derived", "spread-lipschitz", "havens2024-local", "singla2020-curvature", "kim2021-l2",
        "cosine-lipschitz", "sigmoid-ball", "dasoulas2021-lipschitznorm", "rigorous-local", "displacement",
    ),
    attacks=(
        ProtocolAttack(name="token-moving", restarts=8, steps=60),
        ProtocolAttack(name="foolbox:DDN", restarts=8, steps=60),
    ),
    seed=0,
    device="cpu",
    sizes=(0.001, 0.003, 0.01, 0.03, 0.1),
)  # fmt: skip

PROTOCOLS: Mapping[str, Protocol] = {STANDARD.name: STANDARD}
"""The newest version of each."""


def protocol_named(name: str) -> Protocol:
    """Look a protocol up.

    Raises:
        UnknownNameError: A name that does not exist.
    """
    if name not in PROTOCOLS:
        raise UnknownNameError("protocol", name, tuple(PROTOCOLS))
    return PROTOCOLS[name]


def refuse_options(protocol: Protocol, given: Mapping[str, object]) -> None:
    """Refuse options that would change what a protocol measures.

    Args:
        protocol: The protocol.
        given: Option to value; None where it was not given.

    Raises:
        InputError: Names every such option that was given.
    """
    if named := [option for option, value in given.items() if value is not None]:
        raise InputError(
            f"protocol {protocol.name} fixes what {', '.join(named)} would change; leave out "
            f"{'it' if len(named) == 1 else 'them'}, or --protocol"
        )


def protocol_configs(protocol: Protocol, config: RunConfig) -> tuple[RunConfig, ...]:
    """The runs of a protocol, one for each attack; the first has the certificates.

    Args:
        protocol: The protocol.
        config: Model, layers, inputs, output and execution; everything else in it is replaced.

    Raises:
        InputError: The configuration is about a whole model.
    """
    if config.at is not None:
        raise InputError(f"protocol {protocol.name} measures attention layers; name them by --layer")
    kept = {"model", "layers", "texts", "tokens", "images", "dataset", "column", "execution"}
    values = {key: value for key, value in config.model_dump(mode="json").items() if key in kept}
    values |= {"threats": list(protocol.threats), "goals": list(protocol.tolerances)}
    values |= {"seed": protocol.seed, "device": protocol.device}
    found = []
    for place, attack in enumerate(protocol.attacks):
        of_attack = {"method": attack.name, "restarts": attack.restarts, "steps": attack.steps}
        certificates = list(protocol.certificates) if place == 0 else []
        output = config.output / re.sub(r"[^A-Za-z0-9._-]+", "-", attack.name)
        found.append(make_config(values | {"attack": of_attack, "certificates": certificates, "output": str(output)}))
    return tuple(found)


def run_protocol(
    protocol: Protocol, config: RunConfig, *, stop: threading.Event | None = None, watch: Watcher | None = None
) -> Sequence[Outcome]:
    """Compute every row of a protocol that is not yet on disk, attack by attack.

    Args:
        protocol: The protocol.
        config: As for ``protocol_configs``.
        stop: Once set, the running row is finished and the call returns.
        watch: Sees the rows of each attack as they come.

    Raises:
        InputError: What ``protocol_configs`` and ``attnrobust.runs.run.run`` raise.
    """
    stop = threading.Event() if stop is None else stop
    return [run(each, stop=stop, watch=watch) for each in protocol_configs(protocol, config)]


def _plain(value: Any) -> Any:
    return [_plain(one) for one in value] if isinstance(value, tuple) else value
