"""What people mean by names of the field that are called differently here."""

from collections.abc import Mapping

MEANINGS: Mapping[str, Mapping[str, str]] = {
    "threat": {
        "frobenius": "l2 l-2 lp fro frob all joint norm euclidean",
        "per-token": "token-l2 each-token word words all-tokens",
        "per-token-linf": "linf l-inf inf infinity max chebyshev box",
        "per-token-l1": "l1 l-1 manhattan",
        "any-token": "one-token single-token one-word l0 substitution any worst-token",
        "copies:R": "duplication duplicate copy insertion insert",
        "wasserstein:2": "w1 w2 ot transport earth-mover emd",
    },
    "attack": {
        "token-moving": "pgd fgsm bim apgd autoattack gradient cw carlini deepfool hotflip textfooler",
        "mass-splitting": "splitting split wasserstein",
        "token-duplication": "duplication duplicate copies insertion",
    },
    "certificate": {
        "displacement": "crown alpha-crown deept lirpa auto-lirpa zonotope zonotopes linear-relaxation",
        "margin-majorant": "margin margins majorant class-margin",
        "spread-lipschitz": "lipschitz",
        "rigorous-local": "ibp interval intervals arb rigorous exact",
        "conic-margin": "sdp conic semidefinite mip milp",
        "castin2024-derived": "castin castin2024",
        "kim2021-l2": "kim kim2021",
        "havens2024-local": "havens havens2024",
        "singla2020-curvature": "singla curvature hessian",
    },
    "goal": {
        "decision": "class classification label prediction margin logits top1 argmax untargeted next-token",
        "nearest": "anchors anchor retrieval similarity",
        "hidden": "states output displacement hidden-states",
        "pooled": "mean embedding sentence-embedding pooling cls",
    },
}
"""For each kind of name: of every name the words that mean it."""


def meant(kind: str, name: str) -> str | None:
    """The name that is meant by a word of the field; None if there is none.

    Args:
        kind: What was looked up.
        name: What was given, in any case and with any dashes.
    """
    word = name.strip().lower().replace("_", "-").replace(" ", "-")
    return next((known for known, words in MEANINGS.get(kind, {}).items() if word in words.split()), None)
