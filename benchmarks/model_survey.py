"""Which models are read, and how closely: a table from one small random instance of every family.

    python -m benchmarks.model_survey              # writes docs/models.md, some minutes
    python -m benchmarks.model_survey llama t5     # prints these rows only

Every layer's specification is compared with what the module puts out inside its model, in float64 without the roundings
to float32 inside: with sdpa and eager attention, on inputs of 1, 7 and 200 tokens where the model takes any number, and
on the visible tokens of an input that is padded on the left or on the right.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnrobust.models.checks.agreement import AGREEMENT
from attnrobust.models.checks.true_float64 import TrueFloat64
from attnrobust.models.listing import LayerInfo
from attnrobust.models.model import ModuleModel
from tests import hf_models
from tests.hf_families import READ, REFUSED, forward_inputs

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
LENGTHS = (1, 7, 200)
PADDED = 4  # hidden tokens of 11

LEAD = f"""# Which models

Made by `python -m benchmarks.model_survey` from one small random instance of every family (`tests/hf_families.py`,
`tests/hf_models.py`). Where the layers of a family differ, every kind is listed.

*Difference* is the largest difference between specification and module inside the model, relative to the largest
output: over all layers, sdpa and eager attention, inputs of {LENGTHS[0]}, {LENGTHS[1]} and {LENGTHS[2]} tokens (images
and audio: of the size that the model takes), and the visible tokens of inputs that are padded on the left or on the
right. All of it is in float64; what a model rounds to float32 inside is left in float64.

`attnrobust list-layers MODEL` says the same of a model at hand, and why a layer is refused. A layer is the attention
alone, see [Layers](layers.md); not every certificate speaks about every kind of layer, the others refuse it by name.

"""


@dataclass(frozen=True)
class Line:
    """One family."""

    family: str
    layers: str
    parts: tuple[str, ...]
    difference: float
    notes: tuple[str, ...]


def families() -> dict[str, Callable[[], nn.Module]]:
    """Every family that is read, by name."""
    return {**hf_models.MODELS, **READ}


def survey(name: str) -> Line:
    """Read and compare one family."""
    model = ModuleModel(families()[name](), name=name)
    network: Any = model.module
    worst, notes = 0.0, dict[str, None]()
    for implementation in ("sdpa", "eager") if network._supports_sdpa else ("eager",):  # noqa: SLF001
        for part in network.modules():  # some models refuse to have it set, yet ask their configuration for it
            if hasattr(part, "config"):
                part.config._attn_implementation = implementation  # noqa: SLF001
        found = [
            _difference(model, layer.name, inputs, visible)
            for inputs, visible in _inputs(network, name)
            for layer in _supported(model)
        ]
        seen = max((value for value in found if value is not None), default=0.0)
        if seen > AGREEMENT:
            notes[f"{implementation} computes something else ({seen:.0e}) and is refused when it is captured"] = None
        else:
            worst = max(worst, seen)
        if None in found:
            notes["called on a batch of windows: one window by `--tokens`"] = None
    layers = _supported(model)
    return Line(name, layers[0].kind.split(",")[0], tuple(dict.fromkeys(map(parts, layers))), worst, tuple(notes))


def _supported(model: ModuleModel) -> list[LayerInfo]:
    return [layer for layer in model.layers() if layer.supported]


def parts(layer: LayerInfo) -> str:
    """What a layer has beside plain attention."""
    shared = None if layer.kv_heads is None else f"{layer.heads} heads share {layer.kv_heads} keys"
    found = (
        "causal" if layer.mask == "causal" else None,
        shared,
        None if layer.rotary is None else f"rotary {layer.rotary}",
        None if layer.bias is None else f"bias ({layer.bias})",
        None if layer.window is None else f"window {layer.window}",
    )
    return ", ".join(part for part in found if part) or "plain"


def _inputs(network: Any, name: str) -> Iterator[tuple[dict[str, Tensor], Tensor | None]]:
    """Inputs, and which tokens are visible (None: all)."""
    if network.main_input_name in ("pixel_values", "input_values", "input_features"):
        yield _one(network, name, LENGTHS[1]), None
        return
    longest = getattr(network.config, "max_position_embeddings", None) or getattr(network.config, "n_positions", 0)
    for n in LENGTHS:
        yield _one(network, name, n if not longest else min(n, longest - 2)), None
    if getattr(network.config, "is_encoder_decoder", False):
        return  # its attention_mask is the encoder's alone
    for side in (slice(None, PADDED), slice(-PADDED, None)):
        inputs = _one(network, name, 11)
        mask = torch.ones_like(inputs["input_ids"])
        mask[:, side] = 0
        yield inputs | {"attention_mask": mask}, mask[0].bool()


def _one(network: Any, name: str, n: int) -> dict[str, Tensor]:
    return hf_models.model_inputs(name, n) if name in hf_models.MODELS else forward_inputs(network, n)


def _difference(model: ModuleModel, layer: str, inputs: dict[str, Tensor], visible: Tensor | None) -> float | None:
    """Largest difference relative to the largest output; None for a module that is called on a batch of windows."""
    tap = model._tap(model.resolve(layer))  # noqa: SLF001
    seen: dict[str, Tensor] = {}

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen["in"] = tap.adapter.input_tokens(module, args, kwargs)

    def after(_: nn.Module, __: Any, output: Any) -> None:
        seen["out"] = tap.adapter.output_tokens(tap.module, output)

    hooks = (
        tap.module.register_forward_pre_hook(before, with_kwargs=True),
        tap.adapter.output_module(tap.module).register_forward_hook(after),
    )
    with torch.no_grad(), TrueFloat64():
        model.module(**inputs)
    for hook in hooks:
        hook.remove()
    if seen["in"].shape[0] != 1:
        return None
    tokens, output = (seen[key][0] if visible is None else seen[key][0][visible] for key in ("in", "out"))
    return float((tap.spec(tokens) - output).abs().max() / output.abs().max())


def refusal(name: str) -> str:
    """Why the first refused layer of a family is refused."""
    layers = ModuleModel(REFUSED[name][0](), name=name).layers()
    if not layers or any(layer.supported for layer in layers):
        raise AssertionError(f"{name} is supported or lists nothing")
    reasons = dict.fromkeys(part for layer in layers for part in layer.reason.split("; ") if "no adapter" not in part)
    told = (reason.split("Attention: ")[-1] for reason in reasons)
    return "; ".join(reason for reason in told if "has parameters that are not modelled" not in reason)


def row(line: Line) -> str:
    """A line of the table."""
    return f"| {line.family} | `{line.layers}` | {'; '.join((*line.parts, *line.notes))} | {line.difference:.0e} |"


def main(names: list[str]) -> None:
    """Survey the named families, or all and write the page."""
    warnings.simplefilter("ignore")
    table = [row(survey(name)) for name in families() if not names or any(word in name for word in names)]
    if names:
        print("\n".join(table))
        return
    refused = [f"| {name} | {refusal(name)} |" for name in REFUSED]
    page = [LEAD + "| family | class | layers | difference |\n|---|---|---|---|", *table]
    page += ["\n## Refused for now\n\n| family | reason |\n|---|---|", *refused]
    PAGE.write_text("\n".join(page) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
