"""Every certificate by name, and the default selection."""

from attnrobust.certify._certify import CertificateMethod
from attnrobust.certify.castin2024smooth import CastinDerived, CastinReported
from attnrobust.certify.conic import ConicMargin
from attnrobust.certify.dasoulas2021lipschitz import LipschitzNormGlobal
from attnrobust.certify.displacement import DisplacementCertificate
from attnrobust.certify.havens2024local import HavensLocal
from attnrobust.certify.kim2021lipschitz import KimL2
from attnrobust.certify.margin import MarginCertificate
from attnrobust.certify.margin_token import MarginTokenCertificate
from attnrobust.certify.qi2023lipsformer import CosineLipschitz
from attnrobust.certify.rigorous_local import RigorousLocal
from attnrobust.certify.sigmoid_ball import SigmoidBall
from attnrobust.certify.singla2020second import SinglaCurvature
from attnrobust.certify.spread import SpreadLipschitz
from attnrobust.errors import UnknownNameError

ALL_METHODS: tuple[CertificateMethod, ...] = (
    CastinReported(),
    CastinDerived(),
    SpreadLipschitz(),
    HavensLocal(),
    SinglaCurvature(),
    KimL2(),
    CosineLipschitz(),
    SigmoidBall(),
    LipschitzNormGlobal(),
    RigorousLocal(),
    DisplacementCertificate(),
    MarginTokenCertificate(),
    MarginCertificate(),
)
"""The default selection, cheap ones first; ``certify`` runs all that apply unless names are given."""

ON_REQUEST: tuple[CertificateMethod, ...] = (ConicMargin(),)
"""Certificates that take minutes; ``certify`` runs them where they are named."""


def method_named(name: str) -> CertificateMethod:
    """Look a certificate up by its name; UnknownNameError lists the nearest ones."""
    known = {method.name: method for method in (*ALL_METHODS, *ON_REQUEST)}
    if name not in known:
        raise UnknownNameError("certificate", name, known)
    return known[name]
