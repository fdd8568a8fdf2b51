"""foolbox both ways: its attacks on our problems, and our attacks in its pipeline, on one random layer.

python examples/foolbox_pipeline.py
"""

import math

import torch

from attnrobust.attacks import AttackBudget, attack
from attnrobust.attacks.foolbox.attacks import MassSplittingAttack, TokenDuplicationAttack, TokenMovingAttack
from attnrobust.attacks.foolbox.carrier import CarrierModel, to_carrier
from attnrobust.goals import Margin
from attnrobust.layers.attention import Attention
from attnrobust.problem import Problem
from attnrobust.threats.moves import FrobeniusBall
from attnrobust.tokens import TokenMeasure


def main() -> None:
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64) / shape[-2] ** 0.5

    layer = Attention(normal(4, 16, 4), normal(4, 16, 4), normal(4, 16, 4), w_o=normal(4, 4, 16))
    readout = normal(3, 16)
    sentences = [2 * normal(n, 16) for n in (6, 9, 4)]
    budget = AttackBudget(restarts=4, steps=30)

    print("foolbox attacks on our problems: verified radius of each input")
    for method in ("token-moving", "foolbox:DDN", "foolbox:L2PGD", "foolbox:L2DeepFool"):
        problems = [Problem(layer, TokenMeasure(x), FrobeniusBall(), Margin(readout)) for x in sentences]
        radii = [attack(problem, method=method, budget=budget).radius for problem in problems]
        print(f"  {method:20s}", " ".join(f"{radius:.4f}" for radius in radii))

    import foolbox  # after attnrobust: its own import warns about scipy

    fmodel = foolbox.PyTorchModel(CarrierModel(layer, readout).eval(), bounds=(-math.inf, math.inf))
    inputs = to_carrier(sentences, slots=12)  # room for copies and for children of split tokens
    labels = fmodel(inputs).argmax(dim=1)

    print("our attacks in a foolbox pipeline: inputs that fall at each epsilon")
    runs = (
        (TokenMovingAttack(budget=budget), [0.2, 0.5, 1.0, None]),
        (MassSplittingAttack(budget=AttackBudget(restarts=2, steps=10, rounds=1)), [0.1, 0.2, 0.4, None]),
        (TokenDuplicationAttack(), [1.0, 2.0, 3.0]),
    )
    for ours, epsilons in runs:
        _, clipped, success = ours(fmodel, inputs, labels, epsilons=epsilons)
        again = torch.stack([fmodel(points).argmax(dim=1) != labels for points in clipped])
        assert torch.equal(again, success)
        fallen = ", ".join(f"{e}: {int(won.sum())}" for e, won in zip(epsilons, success, strict=True))
        print(f"  {type(ours).__name__:24s} {fallen} of {len(labels)}")


if __name__ == "__main__":
    main()
