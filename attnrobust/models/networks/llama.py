"""Llama, Mistral, Qwen2: pre-norm decoders with RMSNorm, rotary positions, a gated product and a final RMSNorm.

Their code rounds to float32 inside (norms, tables of positions); they are run with that left out (``TrueFloat64``).
"""

from collections.abc import Mapping

from torch import nn

from attnrobust.layers.graph.normalise import Normalise
from attnrobust.models.adapters import class_path
from attnrobust.models.networks import heads
from attnrobust.models.networks.block_layout import BlockLayout, entries, join
from attnrobust.models.networks.heads import HIDDEN, HeadReader, choose_head
from attnrobust.models.networks.parts import read_norm, require_class
from attnrobust.models.networks.pieces import Single
from attnrobust.models.networks.plan import Plan, Wanted

PREFIXES = tuple(
    f"transformers.models.{name.lower()}.modeling_{name.lower()}.{name}" for name in ("Llama", "Mistral", "Qwen2")
)
"""Beginnings of the full names of the classes of each family."""

HEADS: Mapping[str, HeadReader | None] = {
    "Model": None,
    "ForCausalLM": heads.next_word,
    "ForSequenceClassification": heads.classify_last,
}
"""Reader of each head, by the rest of the class's name."""


class LlamaReader:
    """Reads every class of ``PREFIXES`` with a head of ``HEADS``."""

    def classes(self) -> tuple[str, ...]:
        return tuple(prefix + name for prefix in PREFIXES for name in HEADS)

    def plan(self, model: nn.Module, wanted: Wanted) -> Plan:
        path = class_path(model)
        prefix = next(p for p in PREFIXES if path.startswith(p))
        own = HEADS[path.removeprefix(prefix)]
        base = "" if own is None else "model"
        require_class(model, base, f"{prefix}Model")
        blocks = _layout(prefix).read_all(model, entries(model, join(base, "layers")))
        final = Single(join(base, "norm"), Normalise(read_norm(model, join(base, "norm"))))
        head = choose_head(model, wanted, own, base=base, attribute=HIDDEN)
        return Plan(type(model).__name__, (*blocks, final), head, rounds_inside=True)


def _layout(prefix: str) -> BlockLayout:
    """The names inside of a block."""
    return BlockLayout(
        attention="self_attn",
        norm_1="input_layernorm",
        first="mlp.gate_proj",
        activation="mlp.act_fn",
        second="mlp.down_proj",
        norm_2="post_attention_layernorm",
        pre_norm=True,
        gate="mlp.up_proj",
        classes={"": (f"{prefix}DecoderLayer",), "mlp": (f"{prefix}MLP",)},
    )
