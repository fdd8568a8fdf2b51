"""Which certificates and attacks are about moved tokens, and which about measures and copies."""

from attnrobust.attacks import ATTACKS, AttackMethod
from attnrobust.certify import METHODS, ON_REQUEST, CertificateMethod
from attnrobust.threats.moves import MoveThreat

EVERY_METHOD: tuple[CertificateMethod, ...] = (*METHODS, *ON_REQUEST)
MOVING_METHODS = tuple(m for m in METHODS if any(issubclass(t, MoveThreat) for t in m.threats))
MOVING_ATTACKS: tuple[AttackMethod, ...] = tuple(a for a in ATTACKS if MoveThreat in a.threats)
