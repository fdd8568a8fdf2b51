"""``torch.nn.TransformerEncoderLayer``, ``TransformerEncoder``, and ``Sequential`` of these and single layers."""

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from attnrobust.layers.graph.elementwise import Activate
from attnrobust.layers.graph.normalise import Normalise
from attnrobust.models.adapters import LINEAR, class_path
from attnrobust.models.networks.block_layout import BlockLayout, entries, join
from attnrobust.models.networks.heads import choose_head
from attnrobust.models.networks.parts import activation_name, read_affine, read_norm, refuse_at
from attnrobust.models.networks.pieces import Block, Piece, Single
from attnrobust.models.networks.plan import Plan, Wanted

LAYER = "torch.nn.modules.transformer.TransformerEncoderLayer"
ENCODER = "torch.nn.modules.transformer.TransformerEncoder"
SEQUENTIAL = "torch.nn.modules.container.Sequential"
DROPOUT = "torch.nn.modules.dropout.Dropout"

LAYOUT = BlockLayout(
    attention="self_attn",
    norm_1="norm1",
    first="linear1",
    activation="activation",
    second="linear2",
    norm_2="norm2",
    pre_norm=False,
    classes={"": (LAYER,)},
)


class TorchReader:
    """Reads the three classes; a mask that the caller gives is refused by the check."""

    def classes(self) -> tuple[str, ...]:
        return (LAYER, ENCODER, SEQUENTIAL)

    def plan(self, model: nn.Module, wanted: Wanted) -> Plan:
        pieces = tuple(_pieces(model, ""))
        if not pieces:
            raise refuse_at("", "has no part that computes anything")
        head = choose_head(model, wanted, None, base="", attribute="")
        return Plan(type(model).__name__, pieces, head, batch_first=_batch_first(model, pieces))


def _pieces(model: nn.Module, path: str) -> Iterator[Piece]:
    module = model.get_submodule(path)
    name = class_path(module)
    if name == LAYER:
        yield replace(LAYOUT, pre_norm=bool(module.norm_first)).read(model, path)
    elif name == ENCODER:
        for layer in entries(model, join(path, "layers")):
            yield from _pieces(model, layer)
        if module.norm is not None:
            yield from _pieces(model, join(path, "norm"))
    elif name == SEQUENTIAL:
        for child in entries(model, path):
            yield from _pieces(model, child)
    elif name != DROPOUT:  # at rest, as ``refuse_dropout`` has made sure
        yield _single(model, path)


def _single(model: nn.Module, path: str) -> Single:
    module = model.get_submodule(path)
    if class_path(module) == LINEAR:
        return Single(path, read_affine(model, path))
    if type(module) in (nn.LayerNorm, nn.RMSNorm):
        return Single(path, Normalise(read_norm(model, path)))
    name = activation_name(module)
    if name is None:
        raise refuse_at(path, f"{class_path(module)} is not modelled")
    return Single(path, Activate(name))


def _batch_first(model: nn.Module, pieces: tuple[Piece, ...]) -> bool:
    """The common layout of the blocks' tensors."""
    attentions = (model.get_submodule(p.attention_path) for p in pieces if isinstance(p, Block))
    layouts = {bool(attention.batch_first) for attention in attentions}
    if len(layouts) > 1:
        raise refuse_at("", "mixes blocks with batch_first=True and False")
    return layouts.pop() if layouts else True
