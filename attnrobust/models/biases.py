"""Position biases kept outside of the layer: tables of the first block or of the encoder, ALiBi slopes."""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnrobust.layers.head_bias import HeadBias
from attnrobust.models.adapters import refuse
from attnrobust.models.checks.true_float64 import TrueFloat64

_MPNET_FAR = 128  # max_distance of MPNetEncoder.relative_position_bucket


def owners(model: nn.Module, module: nn.Module) -> Iterator[nn.Module]:
    """The modules around one, from itself to the root."""
    name = next((name for name, part in model.named_modules() if part is module), None)
    parts = name.split(".") if name else []
    for length in range(len(parts), -1, -1):
        yield model.get_submodule(".".join(parts[:length]))


def table(matrix: Float[Tensor, "h n n"], far: int) -> HeadBias:
    """The rule of biases that depend on ``j - i`` alone and do not change from a distance of ``far`` on.

    Args:
        matrix: Biases of n > far + 1 tokens.
        far: The distance.

    Raises:
        ValueError: The matrix is none of that rule.
    """
    behind, ahead = matrix[:, 1 : far + 1, 0].flip(1), matrix[:, 0, : far + 1]
    rule = HeadBias(table=torch.cat((behind, ahead), dim=1))
    if not torch.equal(rule.matrix(matrix.shape[1]), matrix):
        raise ValueError("the biases do not depend on the distance alone")
    return rule


def t5_bias(model: nn.Module, module: nn.Module) -> HeadBias:
    """T5: the first block of a stack has the table, every block of it is given the biases.

    Raises:
        UnsupportedModelError: No block of the model has the table.
    """
    for owner in owners(model, module):
        parts: Iterator[Any] = owner.modules()
        for part in parts:
            same = type(part) is type(module) and getattr(part, "is_decoder", 0) == getattr(module, "is_decoder", 0)
            if same and getattr(part, "has_relative_attention_bias", False):
                far = int(part.relative_attention_max_distance)
                return _distance_table(module, partial(part.compute_bias, far + 3, far + 3), far)
    raise refuse(module, "its position biases are in the first block of its model; give the whole model, not the layer")


def mpnet_bias(model: nn.Module, module: nn.Module) -> HeadBias:
    """MPNet: one table in the encoder for all layers.

    Raises:
        UnsupportedModelError: There is no encoder around the layer.
    """
    for owner in owners(model, module):
        compute: Any = getattr(owner, "compute_position_bias", None)
        if compute is not None:
            tokens = next(module.parameters()).new_zeros(1, _MPNET_FAR + 3, 1)
            return _distance_table(module, partial(compute, tokens), _MPNET_FAR)
    raise refuse(module, "its position biases are in the encoder of its model; give the whole model, not the layer")


def _distance_table(module: nn.Module, compute: Callable[[], Tensor], far: int) -> HeadBias:
    try:
        with torch.no_grad(), TrueFloat64():
            return table(compute()[0].detach().to(torch.float64), far)
    except ValueError as error:
        raise refuse(module, f"{error}, so they are not modelled") from error


def beit_bias(model: nn.Module, module: nn.Module) -> HeadBias | None:
    """BEiT: biases of its block, and of its encoder for all blocks, for the image size of its configuration."""
    names = ("relative_position_bias", "shared_position_bias")
    found = [getattr(owner, name, None) for owner in owners(model, module) for name in names]
    tables: list[Any] = [part for part in found if isinstance(part, nn.Module)]
    if not tables:
        return None
    height, width = tables[0].window_size
    with torch.no_grad(), TrueFloat64():
        total = sum(part((height, width), False, dim_size=height * width + 1)[0] for part in tables)
    return HeadBias(explicit=torch.as_tensor(total).detach().to(torch.float64))


def alibi_bias(module: nn.Module, heads: int, *, factor: float = 1.0) -> HeadBias:
    """ALiBi slopes by the code of the model itself, times ``factor``.

    Biases of the form ``slope (j - c)`` are those of ``slope (j - i)``: a term of the row alone cancels.
    """
    file = vars(sys.modules[type(module).__module__])
    like = next(module.parameters())
    with torch.no_grad(), TrueFloat64():
        if "build_mpt_alibi_tensor" in file:
            positions = file["build_mpt_alibi_tensor"](heads, 3, device=like.device)[:, 0]
        else:
            ones = torch.ones(1, 3, dtype=torch.int64, device=like.device)
            positions = file["build_alibi_tensor"](ones, heads, torch.float64)[:, 0]
    positions = positions.to(torch.float64)
    return HeadBias(slopes=factor * (positions[:, 2] - positions[:, 1]))
