"""Every family that is read as a network against its own forward pass: docs/network-agreement.md.

    python -m benchmarks.network_agreement

Small random models (the tests' own), float64, one random input each. "largest difference" is over the output and every
state between blocks, relative to the terms that an entry adds up (``attnrobust/models/networks/check.py``); 1e-10 is
allowed. What is refused is shown with its reason.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from attnrobust.errors import UnsupportedModelError
from attnrobust.models.model import ModuleModel
from attnrobust.models.networks.check import difference_of_terms
from attnrobust.models.networks.plan import Wanted
from attnrobust.models.networks.reading import plan_of
from attnrobust.models.networks.states import watch
from tests.models.networks.models import HEADS, TORCH, inputs_of, torch_inputs, torch_model

PAGE = Path(__file__).parents[1] / "docs" / "network-agreement.md"
TOP = """# Agreement of whole networks with their models

Made by `python -m benchmarks.network_agreement`: small random models of every family that is read
([Whole models](networks.md)), float64, one random input each. A number is the largest difference of the output and of
every state between blocks from the model's own forward pass, relative to the terms that an entry adds up; at most 1e-10
is allowed, and every model is checked so at load, on the user's own input. eager and sdpa are `attn_implementation`.
Padding that is given with the input is refused: delete the padded tokens. MiniLM is a BERT.
Llama, Mistral and Qwen2 are run without the roundings to float32 inside of their code, all others as they are.

| model | eager | sdpa | padding |
|---|---|---|---|
"""


def families() -> tuple[str, ...]:
    """Names of the lines."""
    return (*HEADS, *(f"torch: {name}" for name in TORCH))


def lines() -> Iterator[str]:
    """One line for each model."""
    for name in HEADS:
        row = 2 if name.endswith("words") else None
        inputs = inputs_of(name)
        eager, sdpa = (cell(HEADS[name](attn_implementation=kind), inputs, row) for kind in ("eager", "sdpa"))
        yield f"| {name} | {eager} | {sdpa} | {padded(HEADS[name](), inputs, row)} |"
    for name in TORCH:
        yield f"| torch: {name} | {cell(torch_model(name), torch_inputs(name), None)} | the same | - |"


def cell(model: nn.Module, inputs: dict[str, Tensor], row: int | None) -> str:
    """The largest difference, or why it is refused."""
    return outcome(lambda: f"{largest_difference(model, inputs, row):.1e}")


def outcome(ask: Callable[[], str]) -> str:
    """What is answered, or the refusal in a few words."""
    try:
        return ask()
    except UnsupportedModelError as error:
        return "refused: rounds to float32" if "float32" in str(error) else "refused"


def padded(model: nn.Module, inputs: dict[str, Tensor], row: int | None) -> str:
    """What is said about an input with padding."""
    if "input_ids" not in inputs:
        return "-"
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, -2:] = 0
    return cell(model, inputs | {"attention_mask": mask}, row)


def largest_difference(model: nn.Module, inputs: dict[str, Tensor], row: int | None) -> float:
    """Over the output and the states between blocks, each from the clean state before it and from the input on."""
    ModuleModel(model).network(inputs, row=row)  # refuses what does not agree
    plan = plan_of(model, Wanted(row=row))
    states = watch(model, plan, inputs)
    graph = plan.graph(int(states.entering[0].shape[-1]))
    found = [difference_of_terms(graph, states.entering[0], states.output)]
    for start, end, x, y in zip(plan.states, plan.states[1:], states.entering, states.leaving, strict=False):
        found.append(difference_of_terms(graph.part(start, end), x, y))
    return max(found)


def main() -> None:
    """Write the page."""
    torch.manual_seed(0)
    PAGE.write_text(TOP + "\n".join(lines()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
