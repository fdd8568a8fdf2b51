"""Every attack by name, and the one that belongs to a threat."""

from attnrobust.attacks.foolbox.driver import foolbox_attack
from attnrobust.attacks.foolbox.names import PREFIX, foolbox_names
from attnrobust.attacks.mass_splitting import MassSplitting
from attnrobust.attacks.method import AttackMethod
from attnrobust.attacks.token_duplication import TokenDuplication
from attnrobust.attacks.token_moving import TokenMoving
from attnrobust.errors import UnknownNameError, UnsupportedThreatError
from attnrobust.threats.base import Threat

ATTACKS: tuple[AttackMethod, ...] = (TokenMoving(), MassSplitting(), TokenDuplication())
"""Every attack of this package; the first one that searches a threat is its default. foolbox's are found by name."""

DEFAULT_ATTACK = "default"
"""The name that stands for the threat's own attack."""


def attack_named(name: str) -> AttackMethod:
    """Look an attack up by its name: one of ``ATTACKS``, or ``foolbox:`` and the name of a foolbox attack.

    Raises:
        UnknownNameError: A name that does not exist; lists the nearest ones.
        InputError: A foolbox attack that is refused; says why and what to use instead.
    """
    if name.startswith(PREFIX):
        return foolbox_attack(name)
    known = {method.name: method for method in ATTACKS}
    if name not in known:
        raise UnknownNameError("attack", name, (DEFAULT_ATTACK, *known, *foolbox_names()))
    return known[name]


def check_attack_name(name: str) -> None:
    """Refuse names that are neither an attack's nor the default.

    Raises:
        UnknownNameError: A name that does not exist; lists the nearest ones.
        InputError: A foolbox attack that is refused; says why and what to use instead.
    """
    if name != DEFAULT_ATTACK:
        attack_named(name)


def attack_for(threat: Threat, method: str | AttackMethod = DEFAULT_ATTACK) -> AttackMethod:
    """The attack that was asked for, or the threat's own.

    Raises:
        UnknownNameError: A name that does not exist.
        UnsupportedThreatError: An attack that does not search the threat; names one that does.
    """
    if isinstance(method, str):
        method = _own(threat) if method == DEFAULT_ATTACK else attack_named(method)
    if not isinstance(method, AttackMethod):
        raise UnknownNameError("attack", method, (DEFAULT_ATTACK, *(known.name for known in ATTACKS)))
    if not isinstance(threat, method.threats):
        own = _own(threat).name
        raise UnsupportedThreatError(
            f"attack {method.name!r} does not search {threat.key!r}; leave the attack out, or name {own!r}"
        )
    return method


def _own(threat: Threat) -> AttackMethod:
    for method in ATTACKS:
        if isinstance(threat, method.threats):
            return method
    raise UnsupportedThreatError(f"no attack searches the threat {threat.key!r}")
