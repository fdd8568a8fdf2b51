"""Every Lipschitz upper bound as a claim that either gives a value or says why it does not apply."""

from collections.abc import Iterator
from functools import partial

from attnrobust.certify import METHODS, CertificateMethod
from attnrobust.certify.closed_form import castin2024_mean_field as measures
from attnrobust.certify.closed_form import castin2024_smooth as ball
from attnrobust.certify.closed_form import cosine_lipschitz as cosine
from attnrobust.certify.closed_form import dasoulas2021_lipschitznorm as lipschitznorm
from attnrobust.certify.closed_form import kim2021_l2 as l2
from attnrobust.certify.closed_form import sigmoid_ball as sigmoid
from attnrobust.certify.closed_form import vuckovic2020_measures as kernels
from attnrobust.certify.closed_form.claims import Claim, Quantity, input_of, per_size
from attnrobust.errors import InputError
from attnrobust.layers.token_map import TokenMap
from attnrobust.lipschitz import at_an_input
from attnrobust.lipschitz.question import Question
from attnrobust.numerics.sides import Upper
from attnrobust.threats.moves import MoveThreat

CLOSED_FORMS: tuple[Claim, ...] = (
    *ball.CLAIMS,
    # layers that are Lipschitz on a larger set
    *l2.CLAIMS,
    *cosine.CLAIMS,
    *lipschitznorm.CLAIMS,
    *sigmoid.CLAIMS,
    *l2.PUBLISHED_CLAIMS,
    *cosine.PUBLISHED_CLAIMS,
    *lipschitznorm.PUBLISHED_CLAIMS,
    # token measures
    *measures.CLAIMS,
    *sigmoid.MEASURE_CLAIMS,
    *kernels.CLAIMS,
    *measures.CAUSAL_CLAIMS,
)
"""What the closed formulas claim, file by file."""


def claims(question: Question) -> Iterator[Claim]:
    """Every claim, whatever the layer."""
    yield from CLOSED_FORMS
    yield from at_an_input.CLAIMS
    if question.clean is not None and not question.clean.uniform:
        yield from at_an_input.MASS_CLAIMS
    yield from (_finite(method) for method in METHODS if any(issubclass(t, MoveThreat) for t in method.threats))


def _finite(method: CertificateMethod) -> Claim:
    return Claim(
        name=method.name,
        quantity=Quantity.FINITE,
        layer=None,
        region=method.region,
        conditions="moves of at most epsilon around X",
        reference=method.reference,
        value=partial(_usage, method=method),
        kind=method.kind,
    )


def _usage(_: TokenMap, question: Question, *, method: CertificateMethod) -> Upper:
    input_of(question)
    reason = method.refuses(question.problem)
    if reason is not None:
        raise InputError(reason)
    assert question.epsilon is not None  # noqa: S101 - there is one where there is an input
    bound = method.prepare(question.problem, seed=question.seed)
    upper = per_size(bound.usage(question.epsilon), question.epsilon)
    return Upper(upper.value, bound.failure_probability)
