"""Character language models with dot-product, L2 and contractive L2 attention: validation loss against depth."""

import math
from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attnrobust.certify.closed_form.kim2021_l2 import derived_constant
from attnrobust.layers.trainable import TrainableL2Attention
from attnrobust.lipschitz.derivative import derivative_norm
from attnrobust.lipschitz.invertible import ContractiveResidual
from attnrobust.lipschitz.regulariser import regulariser
from attnrobust.reports.curves import Curve, Panel
from attnrobust.reproduce.experiment import Experiment, Part, Row, Setting, Verdict, column, groups
from attnrobust.reproduce.texts import digest, library_text
from attnrobust.tokens import TokenMeasure

DOT, L2, CONTRACTIVE = "dot product", "L2", "contractive L2"
KINDS = (DOT, L2, CONTRACTIVE)
SHARE = 0.9
"""Lipschitz constant of a contractive attention branch."""
HELD_OUT = 0.1
"""Share of the text, its end, that is not trained on."""
SHOWN_TOKENS = 16
"""Tokens at which the trained layer's derivative is looked at."""
EVALUATED = 64
"""Windows of the validation loss."""


def parts(setting: Setting) -> list[Part]:
    """One model a part."""
    depths = setting.pick((1,), (1, 2, 4), (2, 4, 6, 8, 10, 12, 14, 16, 18))
    sizes = setting.pick((16, 2, 16, 4, 5), (64, 4, 48, 16, 250), (512, 8, 256, 64, 30_000))
    width, heads, context, batch, steps = sizes
    config: Row = {"width": width, "heads": heads, "context": context, "batch": batch, "steps": steps}
    return [
        Part(
            name=f"{kind.replace(' ', '-').lower()}-{depth}",
            config={"kind": kind, "depth": depth, "text_digest": digest(library_text()), **config},
            compute=partial(_trained, kind, depth, sizes, setting.seed),
        )
        for depth in depths
        for kind in KINDS
    ]


# ---- the model -----------------------------------------------------------------------------------------------------


class _DotProduct(nn.Module):
    """Causal dot-product attention as torch has it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        output: Tensor = self.inner(x, x, x, attn_mask=hidden, need_weights=False)[0]
        return output


class _Block(nn.Module):
    """``x + attention``, then ``x + MLP``; a contractive branch takes x as it is, so that it can be inverted."""

    def __init__(self, kind: str, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.kind, self.context = kind, context
        self.attention = _DotProduct(width, heads) if kind == DOT else TrainableL2Attention(width, heads, causal=True)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        if self.kind == CONTRACTIVE:
            constant = regulariser(self.attention, tokens=self.context)
            x = x + (SHARE / constant).to(x.dtype) * self.attention(x)
        else:
            x = x + self.attention(self.first(x))
        output: Tensor = x + self.mlp(self.second(x))
        return output


class _Language(nn.Module):
    """Embedding, positions, blocks, normalisation, readout."""

    def __init__(self, kind: str, depth: int, vocabulary: int, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(_Block(kind, width, heads, context) for _ in range(depth))
        self.norm, self.readout = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def embed(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        """What enters the first block."""
        embedded: Tensor = self.embedding(ids) + self.positions(torch.arange(ids.shape[1]))
        return embedded

    def loss(self, ids: Int[Tensor, "b m"]) -> Float[Tensor, ""]:
        """Mean cross-entropy of every next character, in nats."""
        x = self.embed(ids[:, :-1])
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.readout(self.norm(x)).flatten(0, 1), ids[:, 1:].flatten())


# ---- training ------------------------------------------------------------------------------------------------------


def _trained(kind: str, depth: int, sizes: tuple[int, int, int, int, int], seed: int) -> list[Row]:
    width, heads, context, batch, steps = sizes
    ids, vocabulary = _characters()
    border = int(len(ids) * (1.0 - HELD_OUT))
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        model = _Language(kind, depth, vocabulary, width, heads, context)
        loss = _train(model, ids[:border], context, batch, steps, seed)
    held_out = _windows(ids[border:], context, EVALUATED, torch.Generator().manual_seed(seed + 1))
    with torch.no_grad():
        validation = float(model.eval().loss(held_out))
    row: Row = {"attention": kind, "depth": depth, "training_loss": loss, "validation_loss": validation}
    return [row | _shown(model, held_out, context)]


def _characters() -> tuple[Int[Tensor, "m"], int]:
    """The text as numbers of its characters, the most common ones of ASCII."""
    text = library_text()
    known = {c: place for place, c in enumerate(sorted({c for c in text if c.isascii()}))}
    return torch.tensor([known.get(c, 0) for c in text]), len(known)


def _windows(ids: Int[Tensor, "m"], context: int, count: int, generator: torch.Generator) -> Int[Tensor, "b w"]:
    starts = torch.randint(0, len(ids) - context, (count,), generator=generator)
    return ids[starts[:, None] + torch.arange(context + 1)]


def _train(model: _Language, ids: Int[Tensor, "m"], context: int, batch: int, steps: int, seed: int) -> float:
    """Adam with warm-up and cosine decay; the mean loss of the last tenth of the steps."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda k: min((k + 1) / warm, 0.5 * (1.0 + math.cos(math.pi * k / steps)) + 0.02)
    )
    losses = []
    for _ in range(steps):
        optimiser.zero_grad()
        loss = model.loss(_windows(ids, context, batch, generator))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


def _shown(model: _Language, held_out: Int[Tensor, "b m"], context: int) -> Row:
    """The trained first layer as it is certified: bound, derivative at text, and the inverse of its residual."""
    block = model.blocks[0]
    assert isinstance(block, _Block)  # noqa: S101 - narrows the type
    if not isinstance(block.attention, TrainableL2Attention):
        return {}
    layer = block.attention.spec()
    with torch.no_grad():
        x = model.embed(held_out[:1, :SHOWN_TOKENS])
        entering = x[0] if block.kind == CONTRACTIVE else block.first(x)[0]
    tokens = entering.double()
    constant = derived_constant(layer, context)
    row: Row = {"found": derivative_norm(layer, TokenMeasure(tokens)).value, "upper": constant.value}
    if block.kind == CONTRACTIVE:
        residual = ContractiveResidual(layer, constant, SHARE, context)
        back = residual.inverse(residual(tokens))
        error = float(torch.linalg.vector_norm(back.tokens - tokens))
        row |= {"inverse_error": error, "inverse_iterations": back.iterations}
    return row


# ---- what is shown -------------------------------------------------------------------------------------------------


def panels(rows: Sequence[Row]) -> list[Panel]:
    """Losses against depth, and the trained layers' bounds."""
    losses = [
        Curve(label=str(kind), x=column(rows, "depth", attention=kind), y=column(rows, "validation_loss",
              attention=kind))
        for kind in groups(rows, "attention")
    ]  # fmt: skip
    bounds = [
        Curve(label=f"{kind}: {label}", x=column(rows, "depth", attention=kind), y=column(rows, key, attention=kind),
              style=style, colour=colour)
        for colour, kind in enumerate((L2, CONTRACTIVE), start=1)
        for key, label, style in (("upper", "bound", "o-"), ("found", "derivative at text", "x--"))
    ]  # fmt: skip
    return [
        Panel(title="held-out text", x="blocks", y="loss (nats a character)", curves=losses, log_x=False, log_y=False),
        Panel(title="first attention layer after training", x="blocks", y="Lipschitz constant", curves=bounds,
              log_x=False),
    ]  # fmt: skip


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """L2 against dot product, and the price of a contraction."""
    losses = {kind: column(rows, "validation_loss", attention=kind) for kind in KINDS}
    depth = column(rows, "depth", attention=DOT)
    gap = [a - b for a, b in zip(losses[L2], losses[DOT], strict=True)]
    price = [a - b for a, b in zip(losses[CONTRACTIVE], losses[DOT], strict=True)]
    at = [f"{int(n)}" for n in depth]
    inverses = column(rows, "inverse_error")
    return [
        Verdict(
            claim="L2 attention with equal queries and keys costs little against dot-product attention",
            paper="a small loss at equal depth",
            ours=", ".join(f"{value:+.3f} nats at {n} blocks" for value, n in zip(gap, at, strict=True)),
            agrees=max(gap) < 0.15,
            reason="same block, same steps, but few of them: the value path of L2 attention has the factor w_q w_q^T, "
            "small at first, so it starts slower; the paper trains to the end",
        ),
        Verdict(
            claim="contractive (invertible) attention needs more depth for the same loss",
            paper="higher loss at equal depth, smaller with depth",
            ours=", ".join(f"{value:+.3f} nats at {n} blocks" for value, n in zip(price, at, strict=True)),
            agrees=min(price) > 0.0,
            reason="each branch is divided by its bound, so a block moves its tokens little",
        ),
        Verdict(
            claim="the trained contractive layer is invertible",
            paper="yes",
            ours=", ".join(f"{error:.1e}" for error in inverses) + " (Frobenius error of the inverse)",
            agrees=max(inverses) < 1e-6,
            reason="rate 0.9 by the bound at the trained weights",
        ),
    ]


EXPERIMENT = Experiment(
    name="kim2021-language",
    paper="Kim, Papamakarios, Mnih, The Lipschitz constant of self-attention, ICML 2021",
    statement="character language models with dot-product, L2 and contractive L2 attention: loss against depth",
    minutes=(2, 6000),
    parts=parts,
    panels=panels,
    verdicts=verdicts,
    sides=(("found", "upper"),),
)
