"""ViT and DeiT: pre-norm, a final LayerNorm, classification of the class token (and of DeiT's distillation token).

The class token is among the hidden states that enter block 0, so it is a token that may move like the patches.
"""

from torch import nn

from attnrobust.layers.graph.normalise import Normalise
from attnrobust.models.adapters import class_path
from attnrobust.models.networks import heads
from attnrobust.models.networks.block_layout import BlockLayout, entries, join
from attnrobust.models.networks.heads import HIDDEN, affine, choose_head
from attnrobust.models.networks.parts import read_norm, require_class
from attnrobust.models.networks.pieces import Single
from attnrobust.models.networks.plan import Head, Plan, Wanted

_MODELS = "transformers.models"

PREFIXES = {"vit": f"{_MODELS}.vit.modeling_vit.ViT", "deit": f"{_MODELS}.deit.modeling_deit.DeiT"}
"""Beginning of the class names by the attribute of the base model."""


class VitReader:
    """Reads ``...Model`` and ``...ForImageClassification`` of ViT and DeiT."""

    def classes(self) -> tuple[str, ...]:
        return tuple(prefix + name for prefix in PREFIXES.values() for name in ("Model", "ForImageClassification"))

    def plan(self, model: nn.Module, wanted: Wanted) -> Plan:
        path = class_path(model)
        attribute, prefix = next((a, p) for a, p in PREFIXES.items() if path.startswith(p))
        own = None if path == f"{prefix}Model" else _image
        base = "" if own is None else attribute
        require_class(model, base, f"{prefix}Model")
        blocks = _layout(prefix).read_all(model, entries(model, join(base, "layers")))
        final = Single(join(base, "layernorm"), Normalise(read_norm(model, join(base, "layernorm"))))
        head = choose_head(model, wanted, own, base=base, attribute=HIDDEN)
        return Plan(type(model).__name__, (*blocks, final), head)


def _layout(prefix: str) -> BlockLayout:
    return BlockLayout(
        attention="attention",
        norm_1="layernorm_before",
        first="mlp.fc1",
        activation="mlp.activation_fn",
        second="mlp.fc2",
        norm_2="layernorm_after",
        pre_norm=True,
        classes={"": (f"{prefix}Layer",), "mlp": (f"{prefix}MLP",)},
    )


def _image(model: nn.Module, row: int | None) -> Head:
    return heads.classify_first(model, row, affine(model, "classifier"), heads.IMAGE)
