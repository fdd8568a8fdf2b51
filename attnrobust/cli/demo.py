"""The command that compares on what ships with the package."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import typer

from attnrobust.cli import options as o
from attnrobust.cli.compare import chosen_certificates, compute
from attnrobust.cli.exits import ExitCode
from attnrobust.cli.goals import one_goal
from attnrobust.cli.output import say
from attnrobust.demo import (
    DECISION_ATTACK,
    DECISION_DEPTHS,
    DEMO_LAYER,
    DEMO_MODEL,
    DEMO_TOLERANCE,
    anchors_file,
    decisions_file,
    demo_file,
)
from attnrobust.errors import InputError
from attnrobust.runs.reading import DEFAULT_ATTACK

commands = typer.Typer()

SLOW = (
    "attack alone, since certificates of all six blocks take much longer; add --certificates network-chain --at block:5"
)

DEMO_OUT, DECISION_OUT = Path("attnrobust-results"), Path("attnrobust-decisions")


@commands.command()
def demo(
    decision: o.Decision = False,
    layer: o.Layer = None,
    at: o.Depths = None,
    tolerance: o.Tolerance = None,
    threat: o.ThreatKey = "frobenius",
    seed: o.Seed = 0,
    device: o.Device = "cpu",
    methods: o.Methods = None,
    all_certificates: o.AllCertificates = False,
    attack: o.Method = DEFAULT_ATTACK,
    json: o.Json = False,
    out: o.ResultsOut = None,
    overwrite: o.Overwrite = False,
    fail_under: o.FailUnder = None,
    quiet: o.Quiet = False,
) -> int:
    """Compare on what ships with the package: one layer of all-MiniLM-L6-v2, or attack (--decision) the whole of it."""
    from attnrobust.runs.config import make_config

    common = {
        "model": DEMO_MODEL, "threats": [threat], "device": device, "seed": seed,
        "certificates": chosen_certificates(methods, everything=all_certificates),
    }  # fmt: skip
    with ExitStack() as stack:
        if decision:
            asked = _decision(stack, layer, at, tolerance) | {"attack": DECISION_ATTACK | {"method": attack}}
            if methods is None and not all_certificates:
                say(SLOW)
                asked["certificates"] = []
        elif at:
            raise InputError("--at is for the whole model; give --decision too")
        else:
            asked = _layer(stack, layer, tolerance) | {"attack": {"method": attack}}
        out = out or (DECISION_OUT if decision else DEMO_OUT)
        config = make_config(common | asked)
        return compute(config, json=json, out=out, overwrite=overwrite, fail_under=fail_under, quiet=quiet)
    return ExitCode.OK


def _layer(stack: ExitStack, layer: str | None, tolerance: str | None) -> dict[str, Any]:
    """One layer, and sentences of growing length."""
    goal = one_goal(None, None, tolerance or DEMO_TOLERANCE, None, None, None, None)
    return {"layers": [layer or DEMO_LAYER], "goals": [goal], "texts": stack.enter_context(demo_file())}


def _decision(stack: ExitStack, layer: str | None, at: list[str] | None, tolerance: str | None) -> dict[str, Any]:
    """The whole model as a classifier by anchor sentences."""
    if layer is not None:
        raise InputError("--decision is about the whole model; leave out --layer, or --decision")
    goal = one_goal("nearest", stack.enter_context(anchors_file()), tolerance, None, None, None, None)
    texts = stack.enter_context(decisions_file())
    return {"at": at or list(DECISION_DEPTHS), "goals": [goal], "texts": texts}
