"""Every attack by name."""

from attnrobust.attacks._attack import AttackMethod
from attnrobust.attacks.token_moving import TokenMoving
from attnrobust.errors import UnknownNameError

ALL_ATTACKS: tuple[AttackMethod, ...] = (TokenMoving(),)
"""Every attack that ``attack`` runs by name."""


def attack_named(name: str) -> AttackMethod:
    """Look an attack up by its name; UnknownNameError lists the nearest ones."""
    known = {method.name: method for method in ALL_ATTACKS}
    if name not in known:
        raise UnknownNameError("attack", name, known)
    return known[name]
