"""The command that asks whether a repeated layer forgets its input, and where it ends."""

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnrobust.cli import options as o
from attnrobust.cli.exits import ExitCode
from attnrobust.cli.output import console, print_json
from attnrobust.errors import InputError
from attnrobust.runs.early import require_there
from attnrobust.text import shown

if TYPE_CHECKING:
    from attnrobust.layers.token_map import TokenMap
    from attnrobust.lipschitz.contraction import Contraction
    from attnrobust.tokens import TokenMeasure

commands = typer.Typer()

Order = Annotated[float, typer.Option(metavar="P", help="1, 2 or inf: of the Wasserstein distance W_p.")]
Accuracy = Annotated[float, typer.Option("--tolerance", metavar="E", help="Distance to the fixed point in W_p.")]


@commands.command("fixed-point")
def fixed_point(
    model: o.ModelName,
    layer: o.Layer = None,
    texts: o.Texts = None,
    tokens: o.Tokens = None,
    radius: o.BallRadius = None,
    order: Order = 2.0,
    tolerance: Accuracy = 1e-9,
    device: o.Device = "cpu",
    json: o.Json = False,
) -> int:
    """Does a stack of this one layer contract, at which proved rate, and to which token?"""
    if texts is None and tokens is None and radius is None:
        raise InputError("give the inputs by --texts FILE or --tokens FILE, or --radius R alone")
    require_there(model, texts=texts, tokens=tokens)
    from attnrobust.goals import Displacement
    from attnrobust.lipschitz.contraction import contraction
    from attnrobust.models.model import load_model
    from attnrobust.runs.inputs import on_device, parse_device, read_inputs

    loaded = load_model(model, device=parse_device(device))
    name, network = loaded.resolve(layer).name, loaded.layer(layer)
    inputs: list[tuple[str | None, TokenMeasure | None]] = [(None, None)]
    if texts is not None or tokens is not None:
        inputs = [
            (c.id, on_device(c.measure, Displacement(1.0), device)[0])
            for c in read_inputs(loaded, layer, texts=texts, tokens=tokens)
        ]
    for identifier, clean in inputs:
        size = _largest(clean) if radius is None and clean is not None else radius
        assert size is not None  # noqa: S101 - an input or a radius was given
        found = _found(contraction(network, radius=size, order=order), network, clean, tolerance)
        if json:
            print_json({"model": model, "layer_name": name, "input": identifier, "tolerance": tolerance, **found})
        else:
            _print(f"{model}, {name}" + ("" if identifier is None else f", {identifier}"), found)
    return ExitCode.OK


def _largest(clean: "TokenMeasure") -> float:
    import torch

    largest = float(torch.linalg.vector_norm(clean.points, dim=-1).max())
    if largest == 0.0:
        raise InputError("every token of the input is zero, which gives a ball of radius 0; give --radius R")
    return largest


def _found(known: "Contraction", network: "TokenMap", clean: "TokenMeasure | None", tolerance: float) -> dict[str, Any]:
    """What is proved and, where there is an input, the fixed point; JSON-ready, infinity as None."""
    from attnrobust.lipschitz.fixed_point import fixed_point

    found: dict[str, Any] = {
        "order": "inf" if math.isinf(known.order) else int(known.order),
        "radius": known.radius,
        "rate": known.rate.value if math.isfinite(known.rate.value) else None,
        "image_radius": known.image_radius.value,
        "proved": known.proved,
        "layers_needed": known.iterations(tolerance) if known.proved else None,
        "fixed_point": None,
    }
    if known.proved and clean is not None:
        end = fixed_point(network, clean, radius=known.radius, order=known.order, tolerance=tolerance)
        found["fixed_point"] = {
            "token": end.tokens[0].tolist(),
            "error": end.error.value,
            "reached": end.reached,
            "iterations": end.iterations,
            "certified_iterations": end.certified_iterations,
            "measured_rate": end.measured_rate.value,
        }
    return found


def _print(title: str, found: dict[str, Any]) -> None:
    stdout, end = console(), found["fixed_point"]
    rate = "inf" if found["rate"] is None else shown(found["rate"])
    stdout.print(f"{title}: W_{found['order']} on the ball of radius {shown(found['radius'])}")
    stdout.print(f"rate at most {rate}, outputs of norm at most {shown(found['image_radius'])}")
    if not found["proved"]:
        stdout.print("no contraction is proved: it takes a rate below 1 and outputs inside the ball")
        return
    stdout.print(f"a contraction: all inputs are within the tolerance after {found['layers_needed']} layers")
    if end is not None:
        norm = math.hypot(*end["token"])
        stdout.print(
            f"every token ends at one point of norm {shown(norm)}, found to {shown(end['error'])} after "
            f"{end['iterations']} layers (proved: at most {end['certified_iterations']})"
        )
