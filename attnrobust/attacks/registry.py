"""Every attack by name."""

from attnrobust.attacks.foolbox.driver import foolbox_attack
from attnrobust.attacks.foolbox.names import PREFIX, foolbox_names
from attnrobust.attacks.method import AttackMethod
from attnrobust.attacks.token_moving import TokenMoving
from attnrobust.errors import UnknownNameError

ALL_ATTACKS: tuple[AttackMethod, ...] = (TokenMoving(),)
"""Every attack of this package that ``attack`` runs by name; foolbox's are added by ``attack_named``."""


def attack_named(name: str) -> AttackMethod:
    """Look an attack up by its name: one of ``ALL_ATTACKS``, or ``foolbox:`` and the name of a foolbox attack.

    Raises:
        UnknownNameError: A name that does not exist; lists the nearest ones.
        InputError: A foolbox attack that is refused; says why and what to use instead.
    """
    if name.startswith(PREFIX):
        return foolbox_attack(name)
    known = {method.name: method for method in ALL_ATTACKS}
    if name not in known:
        raise UnknownNameError("attack", name, (*known, *foolbox_names()))
    return known[name]
