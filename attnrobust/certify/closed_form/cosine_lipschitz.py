"""Scaled cosine attention is Lipschitz on all of space: its constants (Qi et al. 2023; Nair 2025; sharper, derived)."""

import torch

from attnrobust.certify.closed_form.claims import SPACE_REGION, Claim, Quantity, slope_claims
from attnrobust.certify.method import HEAD_FEATURES, CertificateMethod
from attnrobust.certify.shared.change import ChangeBound, smallest
from attnrobust.certify.shared.head_sizes import head_norms, spectral_norm
from attnrobust.certify.shared.reach import Reach, RowSums
from attnrobust.errors import InputError
from attnrobust.layers.variants.cosine import CosineAttention
from attnrobust.numerics.rounding import FORMULA
from attnrobust.numerics.sides import Upper, round_up
from attnrobust.problem import Problem


class CosineLipschitz(CertificateMethod):
    """Lipschitz bound of scaled cosine attention, without any bound on the tokens.

    One head: ``Lip <= nu eps^{-1/2} ||w_o|| [ sqrt(n) (||w_v|| + tau ||w_k||) + tau ||w_q|| ]`` in Frobenius norms; for
    the largest token move, one row and the mean the sqrt(n) is 1. Valid for all masses.
    """

    name = "cosine-lipschitz"
    reference = (
        "derived (docs/certificates-literature.md, section 13), after Qi et al., LipsFormer, ICLR 2023, and Nair 2025 "
        "(arXiv 2510.23012), Theorem 2"
    )
    region = "all of space"
    layers = (CosineAttention,)
    features = HEAD_FEATURES

    def prepare(self, problem: Problem, *, seed: int) -> ChangeBound:
        layer = problem.network
        assert isinstance(layer, CosineAttention)  # noqa: S101 - declared; narrows the type
        eye = torch.eye(layer.value_width, dtype=torch.float64, device=layer.device).expand(layer.heads, -1, -1)
        views = head_norms(layer, layer.nu * layer.eps**-0.5 * eye, problem.resolved)
        rows = RowSums(problem.resolved.weights, Reach.of(problem))
        each = torch.ones(problem.clean.n, dtype=torch.float64, device=layer.device)
        steady = (spectral_norm(layer.w_v) + layer.tau * spectral_norm(layer.w_k)) * rows.steady(each)
        heads = steady * rows.reach.token + layer.tau * spectral_norm(layer.w_q) * rows.moved(each)
        slopes = smallest([view.total(view.norms * heads) for view in views])
        return ChangeBound(problem, lambda size: slopes * size)


def reported_constant(attention: CosineAttention, n: int, *, form: str = "nair") -> Upper:
    """Frobenius Lipschitz constant of one head in its published forms.

    "nair": ``nu eps^{-1/2} (n^2 tau ||w_k|| + n tau ||w_q|| + 2 n ||w_v||)``; "lipsformer": the first two terms with
    ``2 n (n-1)`` and ``2 (n-1)``.

    Args:
        attention: One head without output projection.
        n: Token count, >= 1.
        form: "nair" or "lipsformer".

    Raises:
        InputError: Several heads, an output projection, or another form.

    References:
        Nair 2025 (arXiv 2510.23012), Theorem 2, which also states the form of Qi et al. 2023.
    """
    if attention.heads != 1 or attention.w_o is not None:
        raise InputError("the published forms are for one head without output projection")
    if form not in ("nair", "lipsformer") or n < 1:
        raise InputError("give n >= 1 tokens and form 'nair' or 'lipsformer'")
    key, query = (n * n, n) if form == "nair" else (2 * n * (n - 1), 2 * (n - 1))
    w_k, w_q, w_v = (float(spectral_norm(w)) for w in (attention.w_k, attention.w_q, attention.w_v))
    value = attention.nu * attention.eps**-0.5 * (attention.tau * (key * w_k + query * w_q) + 2 * n * w_v)
    return Upper(round_up(value, relative=FORMULA))


def _reported(form: str) -> Claim:
    return Claim(
        name=f"cosine-reported-{form}",
        quantity=Quantity.BALL,
        layer=CosineAttention,
        region=SPACE_REGION,
        conditions="scaled cosine attention, one head without output projection",
        reference="Nair 2025 (arXiv 2510.23012), Theorem 2, which also states the form of Qi et al. 2023",
        value=lambda layer, asked: reported_constant(layer, asked.n, form=form),
    )


CLAIMS = slope_claims(CosineLipschitz(), CosineAttention)
PUBLISHED_CLAIMS = (_reported("nair"), _reported("lipsformer"))
