"""GPT-2: pre-norm, causal, a final LayerNorm; heads on the last token or on every one."""

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

_FILE = "transformers.models.gpt2.modeling_gpt2"

LAYOUT = BlockLayout(
    attention="attn",
    norm_1="ln_1",
    first="mlp.c_fc",
    activation="mlp.act",
    second="mlp.c_proj",
    norm_2="ln_2",
    pre_norm=True,
    classes={"": (f"{_FILE}.GPT2Block",), "mlp": (f"{_FILE}.GPT2MLP",)},
)


class Gpt2Reader:
    """Reads the classes of ``HEADS``."""

    def classes(self) -> tuple[str, ...]:
        return tuple(HEADS)

    def plan(self, model: nn.Module, wanted: Wanted) -> Plan:
        own = HEADS[class_path(model)]
        base = "" if own is None else "transformer"
        require_class(model, base, f"{_FILE}.GPT2Model")
        blocks = LAYOUT.read_all(model, entries(model, join(base, "h")))
        final = Single(join(base, "ln_f"), Normalise(read_norm(model, join(base, "ln_f"))))
        head = choose_head(model, wanted, own, base=base, attribute=HIDDEN)
        return Plan(type(model).__name__, (*blocks, final), head)


HEADS: Mapping[str, HeadReader | None] = {
    f"{_FILE}.GPT2Model": None,
    f"{_FILE}.GPT2LMHeadModel": heads.next_word,
    f"{_FILE}.GPT2ForSequenceClassification": heads.classify_last,
    f"{_FILE}.GPT2ForTokenClassification": heads.classify_tokens,
}
