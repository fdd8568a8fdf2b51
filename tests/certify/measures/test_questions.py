"""What certificates for measures refuse, and the cure that they name."""

import math

import pytest
import torch

from attnrobust.certify import certify, worst_copies
from attnrobust.comparison import compare
from attnrobust.errors import InputError, UnknownNameError, UnsupportedThreatError
from attnrobust.goals import Displacement, Pool
from attnrobust.layers.variants.l2 import L2Attention
from attnrobust.problem import Problem
from attnrobust.threats.base import Threat
from attnrobust.threats.copies import Copies
from attnrobust.threats.measures import CouplingBall, WassersteinBall
from attnrobust.threats.moves import AnyToken
from tests.assertions import refused
from tests.cases import case_named
from tests.measure_problems import (
    ask,
)


@pytest.mark.parametrize(
    ("threat", "name", "pool", "words"),
    [
        (WassersteinBall(2), "plain-h2-n3-d4", "all", ["declare", "within:R"]),
        (CouplingBall(1), "plain-h2-n3-d4", "mean", ["declare", "within:R"]),
        (WassersteinBall(math.inf), "plain-h2-n3-d4", 0, ["row", "coupling:inf"]),
        (CouplingBall(2, domain_radius=9.0), "plain-h2-n3-d4", 0, ["row 0", "coupling:inf", "mean"]),
        (WassersteinBall(math.inf), "causal", "all", ["mask", "coupling:inf"]),
        (WassersteinBall(2, domain_radius=9.0), "finite-mask", "all", ["mask", "parent"]),
        (CouplingBall(2, domain_radius=9.0), "finite-mask", "mean", ["additive mask", "coupling:inf"]),
        (CouplingBall(1, domain_radius=9.0), "causal", "mean", ["Hardy", "coupling:2"]),
        (Copies(1, order="strict"), "causal", "all", ["tied"]),
        (Copies(12), "masses-long", "all", ["fewer copies"]),
    ],
    ids=str,
)
def test_what_is_not_sound_is_refused_with_a_cure(threat: Threat, name: str, pool: Pool, words: list[str]) -> None:
    report = certify(ask(threat, name=name, pool=pool))
    assert report.best is None
    for word in words:
        assert word in report.why_none


def test_other_threats_layers_and_names_are_refused() -> None:
    case = case_named("plain-h2-n3-d4")
    with refused(UnsupportedThreatError, "frobenius or per-token"):
        Copies(1, moves=AnyToken())
    layer = L2Attention(w_q=torch.eye(4)[None], w_v=torch.eye(4)[None])
    other = Problem(layer, case.tokens, CouplingBall(math.inf), Displacement(0.1))
    assert all(
        "L2Attention" in s.reason or "KimL2" in s.method or "threats" in s.reason for s in certify(other).skipped
    )
    assert certify(other).best is None
    with refused(UnsupportedThreatError, "L2Attention"):
        worst_copies(other)
    with refused(InputError, "outside of the domain radius"):
        ask(CouplingBall(2, domain_radius=0.01))
    with refused(UnknownNameError, "measure-ball"):
        certify(ask(CouplingBall(math.inf)), methods=["measure-bal"])
    with refused(UnsupportedThreatError, "mass-splitting"):
        compare(ask(CouplingBall(math.inf)), attack="token-moving")
