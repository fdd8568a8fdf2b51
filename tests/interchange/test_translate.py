"""Every record that is exported computes in onnxruntime what it computes here; what is not exported is refused."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from attnrobust.errors import InputError, UnsupportedModelError
from attnrobust.interchange.attention import finite_bias
from attnrobust.interchange.box import Precision
from attnrobust.interchange.onnx_file import onnx_bytes, run_onnx
from attnrobust.interchange.program import Program, Value
from attnrobust.interchange.translate import WRITERS, write_map
from attnrobust.layers import graph as g
from attnrobust.layers.attention import Attention
from attnrobust.layers.head_bias import HeadBias
from attnrobust.layers.mlp import Mlp
from attnrobust.layers.network import Network, Residual
from attnrobust.layers.normalisation import LayerNorm, RMSNorm
from attnrobust.layers.pre_norm import PreNormAttention
from attnrobust.layers.rotary import Rotary
from attnrobust.models.read_network import read_network
from tests import layer_variants
from tests.cases import Case, telling_cases
from tests.models.networks.models import HEADS, inputs_of

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnx", reason="the extra onnx is not installed")


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


def content(layer: Any, x: Tensor, mass: Tensor | None, precision: Precision, reach: float | None = None) -> bytes:
    """The file of a map from tokens (1, n, d) to all entries of its output in one row."""
    program = Program()
    length = float(torch.linalg.vector_norm(x, dim=-1).max()) if reach is None else reach
    out = write_map(program, layer, Value("X", int(x.shape[0]), int(x.shape[1]), length), mass=mass)
    program.apply("Reshape", out.name, (1, out.rows * out.width), to="Y")
    return onnx_bytes(program, shape=(1, *x.shape), classes=out.rows * out.width, precision=precision)


def same(layer: Any, x: Tensor, mass: Tensor | None = None) -> None:
    """float64 by onnx's reference; float32 by onnxruntime, relative to the largest output."""
    wanted = layer(x, mass).flatten()
    found = run_onnx(content(layer, x, mass, "float64"), x, "float64")
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)
    run = onnxruntime.InferenceSession(content(layer, x, mass, "float32"), providers=["CPUExecutionProvider"])
    (single,) = run.run(None, {"X": x[None].float().numpy()})
    assert single.dtype == np.float32
    size = float(wanted.abs().max())
    torch.testing.assert_close(torch.from_numpy(single[0]).double(), wanted, rtol=0.0, atol=2e-4 * size)


@pytest.mark.parametrize("case", telling_cases(), ids=lambda case: case.name)
def test_attention(case: Case) -> None:
    same(case.attention, case.tokens.points, None if case.tokens.uniform else case.tokens.mass)


W: dict[str, Any] = {name: draw(2, 6, 4) + shift for name, shift in (("w_q", 0.0), ("w_k", 0.1), ("w_v", 0.2))}
B: dict[str, Any] = {
    "b_q": draw(2, 4),
    "b_k": draw(2, 4) + 0.5,
    "b_v": draw(2, 4) - 0.5,
    "w_o": draw(2, 4, 6),
    "b_o": draw(6),
}
PLACED = {
    "rotary": Attention(**W, **B, rotary=Rotary(frequencies=draw(2)), causal=True),
    "rotary interleaved": Attention(**W, **B, rotary=Rotary(frequencies=draw(1), layout="interleaved", offset=3)),
    "slopes": Attention(**W, head_bias=HeadBias(slopes=torch.tensor([0.5, 0.25])), causal=True),
    "window": Attention(**W, window_left=1, window_right=2),
}


@pytest.mark.parametrize("name", PLACED)
def test_positions(name: str) -> None:
    same(PLACED[name], draw(5, 6))


def norm(kind: Any, bias: bool = True) -> Any:
    return kind(weight=draw(6).abs() + 0.5, bias=draw(6) if bias else None, eps=1e-3)


MAPS: Mapping[str, Any] = {
    **{name: Mlp(draw(6, 5), draw(5, 4), draw(5), draw(4), activation=name) for name in ("relu", "gelu", "sigmoid")},
    "layer norm": norm(LayerNorm),
    "rms norm": norm(RMSNorm, bias=False),
    "pre-norm": PreNormAttention(norm(RMSNorm), Attention(**W, **B, causal=True)),
    "pre-norm residual": PreNormAttention(norm(LayerNorm), Attention(**W, **B), residual=True),
    "network": Network((norm(RMSNorm), Residual(norm(LayerNorm)), Mlp(draw(6, 3), draw(3, 2)))),
}


@pytest.mark.parametrize("name", MAPS)
def test_maps(name: str) -> None:
    same(MAPS[name], draw(4, 6))


def every_node() -> g.NetworkGraph:
    """A graph with every kind of node and every activation."""
    build = g.GraphBuilder(6)
    build.add("class", g.ConcatTokens(draw(1, 6), mass=torch.tensor([0.25], dtype=torch.float64)))
    build.add("positions", g.AddPositions(draw(9, 6)))
    build.add("norm", g.Normalise(norm(LayerNorm)))
    build.add("attend", g.Attend(Attention(**W, **B)))
    read = build.add("sum", g.Sum(), "positions", "attend")
    functions: tuple[g.Activation, ...] = get_args(g.Activation)
    for function in functions:
        build.add(function, g.Activate(function))
    build.add("gate", g.Product(), read, "identity")
    build.add("scale", g.Scale(draw(6)))
    build.add("affine", g.Affine(draw(6, 3), draw(3)))
    build.add("mean", g.PoolMean())
    return build.build()


@pytest.mark.parametrize("mass", [None, torch.tensor([0.5, 0.125, 0.375], dtype=torch.float64)])
def test_every_node(mass: Tensor | None) -> None:
    graph = every_node()
    if mass is None:
        (first, *rest) = graph.steps
        graph = g.NetworkGraph(6, (g.Step(first.name, g.ConcatTokens(draw(1, 6)), first.reads), *rest))
    same(graph, draw(3, 6), mass)
    used = {type(step.node) for step in graph.steps} | {type(layer) for layer in MAPS.values()}
    assert set(WRITERS) == used | {Attention, Residual, g.NetworkGraph, g.PoolRow}


@pytest.mark.parametrize("name", ["bert sequence", "vit image", "gpt2 sequence", "mistral next word"])
def test_whole_models(name: str) -> None:
    read = read_network(HEADS[name](), inputs_of(name))
    same(read.graph, read.input.measure.points)


# ---- bounds of token lengths and masks -------------------------------------------------------------------------------


BOUNDED = {"graph": every_node(), **MAPS, **PLACED}


@pytest.mark.parametrize("name", BOUNDED)
def test_no_token_is_longer_than_is_said(name: str) -> None:
    layer = BOUNDED[name]
    x = 3.0 * draw(50, 5, 6)
    mass = None if isinstance(layer, Attention) else torch.tensor([4, 1, 1, 1, 1], dtype=torch.float64) / 8
    out = write_map(Program(), layer, Value("X", 5, 6, float(x.norm(dim=-1).max())), mass=mass)
    longest = float(layer(x, mass).norm(dim=-1).max())
    assert longest <= out.reach < 1e6 * longest


def test_hidden_keys_are_hidden_at_every_token_of_the_reach() -> None:
    layer = Attention(**{name: 5.0 * value for name, value in W.items()}, causal=True)
    bias = finite_bias(layer, 4, None, 3.0)
    assert bias is not None
    assert bool(torch.isfinite(bias).all())
    x = 3.0 * torch.nn.functional.normalize(draw(200, 4, 6), dim=-1)
    scores = layer.factor * layer.queries(x) @ layer.keys(x).transpose(-1, -2) + bias
    weights = torch.softmax(scores, dim=-1)
    assert bool((weights.triu(1) == 0.0).all())
    torch.testing.assert_close(weights, layer.weights(x), rtol=1e-9, atol=0.0)


def test_masks_beyond_the_range_of_float32_are_refused() -> None:
    layer = Attention(**{name: 1e16 * value for name, value in W.items()}, causal=True)
    with pytest.raises(UnsupportedModelError, match="beyond the range of a finite mask"):
        write_map(Program(), layer, Value("X", 4, 6, 1.0))


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", layer_variants.LAYERS)
def test_other_attention_is_refused_by_name(name: str) -> None:
    layer = layer_variants.LAYERS[name][0]()
    with pytest.raises(UnsupportedModelError, match=f"{type(layer).__name__} is not exported"):
        write_map(Program(), layer, Value("X", 4, 6, 1.0))


@dataclass(frozen=True, eq=False)
class Softer(LayerNorm):
    """Somebody's own layer."""

    cap: float = 1.0


def test_a_subclass_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="Softer is not exported"):
        write_map(Program(), Softer(torch.ones(6)), Value("X", 4, 6, 1.0))


def test_a_field_that_no_writer_knows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WRITERS, LayerNorm, (WRITERS[LayerNorm][0], frozenset({"weight", "bias"})))
    with pytest.raises(UnsupportedModelError, match=r"LayerNorm\.eps is not exported"):
        write_map(Program(), LayerNorm(torch.ones(6)), Value("X", 4, 6, 1.0))
    for kind, (_, known) in WRITERS.items():
        assert known <= {field.name for field in fields(kind)}


def test_weights_beyond_the_range_of_float32_are_refused() -> None:
    with pytest.raises(InputError, match="beyond the range of float32"):
        content(g.Affine(torch.full((6, 2), 1e39, dtype=torch.float64)), draw(3, 6), None, "float32")
