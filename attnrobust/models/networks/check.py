"""Whether a graph is the model: every piece, and the whole, against the states of the model's own forward pass.

The difference of two float64 evaluations is held against the sizes of the terms that the last sum of an entry adds up:
``|x| |W| + |b|`` behind a linear map, ``|u| + |v|`` behind a residual sum, ``|w| (|x - mean| + |mean| + s) / s + |b|``
behind a normalisation with standard deviation s (the entries of ``(x - mean) / s`` have root mean square 1), and the
size of the column behind attention. Nothing in it is absolute.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from attnrobust.errors import UnsupportedModelError
from attnrobust.layers.graph.affine import Affine, Sum
from attnrobust.layers.graph.elementwise import Activate
from attnrobust.layers.graph.network_graph import NetworkGraph
from attnrobust.layers.graph.normalise import Normalise
from attnrobust.layers.graph.rows import PoolMean, PoolRow
from attnrobust.layers.graph.wiring import Step
from attnrobust.layers.normalisation import LayerNorm
from attnrobust.models.capture import Probe
from attnrobust.models.networks.plan import Plan
from attnrobust.models.networks.states import Call, States

AGREEMENT = 1e-10  # of the terms; float64 forwards agree to ~1e-14, float32 rounding inside a model shows as ~1e-7


def require_agreement(model: nn.Module, plan: Plan, graph: NetworkGraph, states: States) -> None:
    """Compare a graph with its model at one input, from the input on.

    Raises:
        UnsupportedModelError: They differ; names the first state that does.
    """
    names, attention = plan.states, iter(states.attention)
    for index, piece in enumerate(plan.pieces):
        if index:
            _require_continuity(names[index], piece.path, states.leaving[index - 1], states.entering[index])
        if piece in plan.blocks:
            _require_attention(names[index + 1], piece.path, *next(attention))
        part = graph.part(names[index], names[index + 1])
        _require(part, states.entering[index], states.leaving[index], names[index + 1], piece.path, model)
    if graph.output != names[-1]:
        head = graph.part(names[-1], graph.output)
        _require(head, states.leaving[-1], states.output, graph.output, plan.head.module, model)
    _require(graph, states.entering[0], states.output, graph.output, plan.head.module, model)


def _require_attention(name: str, path: str, probe: Probe, call: Call) -> None:
    try:
        probe.call(call.index, call.count)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"state {name} ({path}): {error}") from error


def _require_continuity(name: str, path: str, left: Tensor, entered: Tensor) -> None:
    """Nothing may happen between two pieces."""
    if left.shape != entered.shape or not bool((left == entered).all()):
        raise UnsupportedModelError(
            f"state {name}: what enters {path} is not what leaves the part before it; the model does something between "
            "them that is not modelled"
        )


def _require(graph: NetworkGraph, x: Tensor, actual: Tensor, name: str, path: str, model: nn.Module) -> None:
    found = disagreement(graph, x, actual)
    if found is not None:
        raise UnsupportedModelError(
            f"state {name} ({path or 'the output'}): the model's own value differs from its specification by "
            f"{found:.3g} of the terms; {_cause(model)}"
        )


def _cause(model: nn.Module) -> str:
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None) or "sdpa"
    if implementation != "sdpa":
        return f"attn_implementation={implementation!r} may round to float32; load the model with 'sdpa'"
    return "a hook, a replaced forward, a fast path or an option of this call computes something not modelled"


def disagreement(graph: NetworkGraph, x: Tensor, actual: Tensor) -> float | None:
    """The largest difference of an output from the graph's, as a share of the terms; None within ``AGREEMENT``."""
    found = difference_of_terms(graph, x, actual)
    return None if found <= AGREEMENT else found


def difference_of_terms(graph: NetworkGraph, x: Tensor, actual: Tensor) -> float:
    """The largest difference of an output from the graph's, as a share of the terms; infinity for NaN and shapes."""
    states = graph.states(x)
    expected = states[graph.output]
    if actual.shape != expected.shape:
        return float("inf")
    terms = term_sizes(graph, states).clamp_min(torch.finfo(torch.float64).tiny)
    share = (actual.to(expected) - expected).abs() / terms
    return float(share.max()) if bool(torch.isfinite(share).all()) else float("inf")


def term_sizes(graph: NetworkGraph, states: Mapping[str, Tensor]) -> Tensor:
    """Size of the terms of every entry of the output; see the module."""
    steps = {step.name: step for step in graph.steps}
    return _sizes(graph.output, steps, states)


def _sizes(name: str, steps: Mapping[str, Step], states: Mapping[str, Tensor]) -> Tensor:
    if name not in steps:
        return states[name].abs()
    step = steps[name]
    first, node = states[step.reads[0]], step.node
    if isinstance(node, Affine):
        terms = first.abs() @ node.weight.abs()
        return terms if node.bias is None else terms + node.bias.abs()
    if isinstance(node, Normalise):
        return _norm_sizes(node, first)
    if isinstance(node, Sum):
        return _sizes(step.reads[0], steps, states) + _sizes(step.reads[1], steps, states)
    if isinstance(node, Activate):  # their slopes are at most about 1.13
        return _sizes(step.reads[0], steps, states)
    if isinstance(node, PoolRow | PoolMean):
        return node.forward((_sizes(step.reads[0], steps, states),))
    return states[name].abs().amax(dim=-2, keepdim=True).expand_as(states[name])


def _norm_sizes(node: Normalise, x: Tensor) -> Tensor:
    norm = node.norm
    mean = x.mean(dim=-1, keepdim=True) if isinstance(norm, LayerNorm) else x.new_zeros(())
    centred = x - mean
    deviation = (centred.square().mean(dim=-1, keepdim=True) + norm.eps).sqrt()
    sizes = norm.weight.abs() * ((centred.abs() + mean.abs()) / deviation + 1.0)
    return sizes if norm.bias is None else sizes + norm.bias.abs()
