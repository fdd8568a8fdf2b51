"""Where a family of transformer blocks keeps its parts; one block is read by these names."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from attnrobust.errors import UnsupportedModelError
from attnrobust.layers.attention import Attention
from attnrobust.layers.graph.blocks import FeedForward
from attnrobust.models.listing import adapter_for
from attnrobust.models.networks.parts import read_activation, read_affine, read_norm, refuse_at, require_class
from attnrobust.models.networks.pieces import Block


@dataclass(frozen=True)
class BlockLayout:
    """Names of the parts of one kind of block.

    Args:
        attention: The attention module, with its output projection.
        norm_1: The normalisation of the attention part.
        first: First linear map of the feed-forward part.
        activation: Its activation.
        second: Its second linear map.
        norm_2: The normalisation of the feed-forward part.
        pre_norm: Whether the normalisations stand before their parts.
        gate: Linear map of the factor that the activation's output is multiplied by; "" where there is none.
        classes: The exact class of the block ("") and of those parts that compute something by themselves.
    """

    attention: str
    norm_1: str
    first: str
    activation: str
    second: str
    norm_2: str
    pre_norm: bool
    gate: str = ""
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def read(self, model: nn.Module, path: str) -> Block:
        """The block at a path.

        Raises:
            UnsupportedModelError: Another class, a part that is not modelled, parameters that nothing reads.
        """
        for part, classes in self.classes.items():
            require_class(model, join(path, part), *classes)
        self._refuse_foreign(model, path)
        return Block(
            path=path,
            attention_path=join(path, self.attention),
            attention=read_attention(model, join(path, self.attention)),
            norm_1=read_norm(model, join(path, self.norm_1)),
            mlp=self._feed_forward(model, path),
            norm_2=read_norm(model, join(path, self.norm_2)),
            pre_norm=self.pre_norm,
        )

    def _feed_forward(self, model: nn.Module, path: str) -> FeedForward:
        first, second = read_affine(model, join(path, self.first)), read_affine(model, join(path, self.second))
        gate = read_affine(model, join(path, self.gate)) if self.gate else None
        return FeedForward(
            first.weight, second.weight, first.bias, second.bias,
            w_gate=None if gate is None else gate.weight, b_gate=None if gate is None else gate.bias,
            activation=read_activation(model, join(path, self.activation)),
        )  # fmt: skip

    def read_all(self, model: nn.Module, paths: Iterable[str]) -> tuple[Block, ...]:
        """The blocks at these paths; a module that several of them lead to is read, and its weights kept, once."""
        seen: dict[nn.Module, Block] = {}
        blocks = []
        for path in paths:
            module = model.get_submodule(path)
            if module not in seen:
                seen[module] = self.read(model, path)
            blocks.append(replace(seen[module], path=path, attention_path=join(path, self.attention)))
        return tuple(blocks)

    def _refuse_foreign(self, model: nn.Module, path: str) -> None:
        """Every parameter must belong to a part that is read (those of attention are its adapter's matter)."""
        foreign = sorted(self._foreign(model.get_submodule(path)))
        if foreign:
            raise refuse_at(path, f"has parameters that are not modelled: {', '.join(foreign[:6])}")

    def _foreign(self, block: nn.Module) -> Iterator[str]:
        parts = (self.attention, self.norm_1, self.first, self.gate, self.second, self.norm_2)
        read = tuple(f"{part}." for part in parts if part)
        yield from (name for name, _ in block.named_parameters() if not name.startswith(read))


def read_attention(model: nn.Module, path: str) -> Attention:
    """The attention at a path by its adapter, which checks it against forward calls of the module.

    Raises:
        UnsupportedModelError: No adapter, or what the adapter refuses, with the path.
    """
    module = model.get_submodule(path)
    adapter = adapter_for(module, model)
    if adapter is None:
        raise refuse_at(path, f"the attention {type(module).__name__} is not modelled")
    try:
        return adapter.spec(module)
    except UnsupportedModelError as error:
        raise refuse_at(path, str(error)) from error


def entries(model: nn.Module, path: str) -> tuple[str, ...]:
    """Paths of what a list of modules runs through; ``children()`` would leave out a module's second place."""
    return tuple(join(path, name) for name in model.get_submodule(path)._modules)  # noqa: SLF001


def join(*parts: str) -> str:
    """A module path from its parts; empty ones are left out."""
    return ".".join(part for part in parts if part)
