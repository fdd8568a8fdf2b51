"""How far may the tokens of one input move before a layer's output moves by more than 10 %?"""

import torch

from attnrobust import Displacement, FrobeniusBall, Problem, TokenMeasure, compare, from_torch


def main() -> None:
    torch.manual_seed(0)
    module = torch.nn.MultiheadAttention(embed_dim=16, num_heads=4, batch_first=True).eval()
    tokens = torch.randn(8, 16)
    problem = Problem(from_torch(module), TokenMeasure(tokens), FrobeniusBall(), Displacement(0.1, relative=True))
    comparison = compare(problem, seed=0)
    for certificate in comparison.certification.certificates:
        print(f"{certificate.method:24} certifies {certificate.radius:.4g} ({certificate.kind})")
    print(f"{comparison.attack.attack:24} breaks it at {comparison.attack.radius:.4g}")
    print(f"gap {comparison.gap:.3g}")
    assert comparison.gap >= 1


if __name__ == "__main__":
    main()
