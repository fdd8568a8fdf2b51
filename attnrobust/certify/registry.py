"""Every certificate by name, and the default selection."""

from attnrobust.certify.closed_form.castin2024_smooth import CastinDerived, CastinReported
from attnrobust.certify.closed_form.cosine_lipschitz import CosineLipschitz
from attnrobust.certify.closed_form.dasoulas2021_lipschitznorm import LipschitzNormGlobal
from attnrobust.certify.closed_form.havens2024_local import HavensLocal
from attnrobust.certify.closed_form.kim2021_l2 import KimL2
from attnrobust.certify.closed_form.sigmoid_ball import SigmoidBall
from attnrobust.certify.closed_form.singla2020_curvature import SinglaCurvature
from attnrobust.certify.closed_form.spread_lipschitz import SpreadLipschitz
from attnrobust.certify.conic.method import ConicMargin
from attnrobust.certify.displacement.method import DisplacementCertificate
from attnrobust.certify.margin.all_tokens.method import MarginCertificate
from attnrobust.certify.margin.one_token.method import MarginTokenCertificate
from attnrobust.certify.measures.ball import MeasureBall
from attnrobust.certify.measures.cluster import MeasureCluster
from attnrobust.certify.measures.copies import MeasureCopies
from attnrobust.certify.measures.curvature import MeasureCurvature
from attnrobust.certify.measures.local import MeasureLocal
from attnrobust.certify.method import CertificateMethod
from attnrobust.certify.network.chain import NetworkChain
from attnrobust.certify.network.composite.method import NetworkComposite, NetworkCompositeLarge
from attnrobust.certify.network.literature import NetworkLipschitz
from attnrobust.certify.network.product import NetworkProduct
from attnrobust.certify.pre_norm.margin import PreNormMargin
from attnrobust.certify.pre_norm.scales import PreNormScales
from attnrobust.certify.rigorous.local import RigorousLocal
from attnrobust.errors import UnknownNameError

METHODS: tuple[CertificateMethod, ...] = (
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
    PreNormScales(),
    PreNormMargin(),
    NetworkLipschitz(),
    NetworkProduct(),
    NetworkChain(),
    MeasureBall(),
    MeasureLocal(),
    MeasureCurvature(),
    MeasureCluster(),
    MeasureCopies(),
    NetworkComposite(),
)
"""The default selection, for each threat cheap ones first; ``certify`` runs all that apply unless names are given."""

ON_REQUEST: tuple[CertificateMethod, ...] = (ConicMargin(), NetworkCompositeLarge())
"""Certificates that take minutes; ``certify`` runs them where they are named."""


def method_named(name: str) -> CertificateMethod:
    """Look a certificate up by its name; UnknownNameError lists the nearest ones."""
    known = {method.name: method for method in (*METHODS, *ON_REQUEST)}
    if not isinstance(name, str) or name not in known:
        raise UnknownNameError("certificate", name, known)
    return known[name]
