"""Local Lipschitz constant of the attention of a sentence encoder against the number of tokens."""

import statistics
from collections.abc import Sequence
from functools import cache, partial

import torch

from attnrobust.models.model import Model, load_model
from attnrobust.reports.curves import Curve, Panel
from attnrobust.reproduce.experiment import Experiment, Part, Row, Setting, Verdict, column, groups
from attnrobust.reproduce.fits import PowerLaw
from attnrobust.reproduce.growth import adversarial, at_tokens, exponent, fitted, random_tokens
from attnrobust.reproduce.texts import digest, prose

MODEL = "minilm"
LAYERS = tuple(range(6))
LENGTHS = (8, 16, 32, 64, 128)
WORDS_A_TOKEN = 0.75
"""Of the texts; the tokens are counted afterwards."""
BOUNDED = 40
"""Most tokens at which the bound at the tokens is computed; it takes longer than the norm."""
REAL, RANDOM, ADVERSARIAL = "text", "random directions", "adversarial"


def parts(setting: Setting) -> list[Part]:
    """One part for each layer."""
    layers = setting.pick((2,), LAYERS, LAYERS)
    lengths = setting.pick((4, 8, 12), LENGTHS, (*LENGTHS, 256, 500))
    texts = setting.pick(1, 2, 8)
    steps = setting.pick(8, 30, 200)
    known = digest(" ".join(prose()[:texts]))
    config: Row = {"lengths": str(lengths), "texts": texts, "steps": steps, "text_digest": known, "model": MODEL}
    return [
        Part(
            name=f"layer-{layer}",
            config={"layer": layer, **config},
            compute=partial(_layer, layer, lengths, texts, steps, setting.seed),
        )
        for layer in layers
    ]


@cache
def _model() -> Model:
    return load_model(MODEL)


def _layer(number: int, lengths: Sequence[int], texts: int, steps: int, seed: int) -> list[Row]:
    model, name = _model(), f"encoder.layer.{number}.attention"
    layer = model.layer(name)
    chosen = [" ".join(text.split()[: max(1, round(n * WORDS_A_TOKEN))]) for text in prose()[:texts] for n in lengths]
    inputs = [captured.measure.points for captured in model.capture(name, chosen)]
    radius = float(torch.cat([torch.linalg.vector_norm(points, dim=-1) for points in inputs]).max())
    rows: list[Row] = []
    for place, points in enumerate(inputs):
        first = place < len(lengths)  # of the first text: also random tokens, and the bound at few tokens
        local = first and len(points) <= BOUNDED
        rows.append(at_tokens(layer, points, radius, seed=seed, local=local, layer=number, tokens=REAL))
        if first:
            drawn = random_tokens(points, seed=seed) * (1.0 - 1e-15)  # so that no rounding leaves the ball
            rows.append(at_tokens(layer, drawn, radius, seed=seed, local=False, layer=number, tokens=RANDOM))
    return rows + adversarial(layer, lengths, radius, steps=steps, seed=seed, layer=number, tokens=ADVERSARIAL)


# ---- what is shown -------------------------------------------------------------------------------------------------


def panels(rows: Sequence[Row]) -> list[Panel]:
    """A field for each layer."""
    return [_panel(rows, layer) for layer in groups(rows, "layer")]


def _panel(rows: Sequence[Row], layer: object) -> Panel:
    mine = [row for row in rows if row["layer"] == layer]
    curves = []
    for colour, kind in enumerate((REAL, RANDOM, ADVERSARIAL)):
        n, found = column(mine, "n", tokens=kind), column(mine, "found", tokens=kind)
        curves.append(Curve(label="", x=n, y=found, style="o", colour=colour))
        curves += fitted(exponent(mine, tokens=kind), kind, colour)
    n, upper = column(mine, "n", tokens=ADVERSARIAL), column(mine, "upper", tokens=ADVERSARIAL)
    curves.append(Curve(label="bound on the ball", x=n, y=upper, style="--", colour=7))
    return Panel(title=f"layer {layer}", x="tokens n", y="norm of the derivative", curves=curves)


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """The exponents, the medians over the layers."""
    return [
        _verdict(
            rows, REAL, 0.25, (0.0, 0.5), "real text grows like n^(1/4)",
            "another encoder and other text than the paper's; layers differ, and the fit has few lengths",
        ),
        _verdict(
            rows, ADVERSARIAL, 0.5, (0.4, 0.6), "adversarial inputs grow like n^(1/2)",
            "one token against n - 1 equal ones reaches the rate sqrt(n - 1) until e^(2 gamma R^2) < n",
        ),
        _spread(rows),
    ]  # fmt: skip


def _laws(rows: Sequence[Row], kind: str) -> dict[str, PowerLaw]:
    found = {str(layer): exponent(rows, layer=layer, tokens=kind) for layer in groups(rows, "layer")}
    return {layer: law for layer, law in found.items() if law is not None}


def _verdict(
    rows: Sequence[Row], kind: str, paper: float, allowed: tuple[float, float], claim: str, reason: str
) -> Verdict:
    laws = _laws(rows, kind)
    if not laws:
        return Verdict(claim=claim, paper=f"{paper}", ours="too few lengths", agrees=None, reason=reason)
    middle = statistics.median(law.exponent for law in laws.values())
    ours = ", ".join(f"layer {layer}: {law}" for layer, law in laws.items())
    agrees = allowed[0] <= middle <= allowed[1]
    return Verdict(claim=claim, paper=f"{paper}", ours=f"median {middle:.2f}; {ours}", agrees=agrees, reason=reason)


def _spread(rows: Sequence[Row]) -> Verdict:
    laws, others = _laws(rows, REAL), _laws(rows, ADVERSARIAL)
    below = [layer for layer in laws if layer in others and laws[layer].exponent < others[layer].exponent]
    return Verdict(
        claim="text grows slower than adversarial inputs",
        paper="yes",
        ours=f"in {len(below)} of {len(laws)} layers",
        agrees=len(below) == len(laws) if laws else None,
        reason="text is far from the worst case: its tokens do not react to a single one",
    )


EXPERIMENT = Experiment(
    name="castin2024-growth",
    paper="Castin, Ablin, Peyre, How smooth is attention?, ICML 2024",
    statement="local Lipschitz constant against the number of tokens, layer by layer: text, random, adversarial",
    minutes=(3, 120),
    parts=parts,
    panels=panels,
    verdicts=verdicts,
    sides=(("found", "upper"), ("found", "local_upper")),
)
