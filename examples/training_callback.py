"""A plain PyTorch training loop that watches the certified radius of its attention layer after every epoch."""

import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn

from attnrobust import AlreadyViolatedError, FrobeniusBall, Margin, Problem, TokenMeasure, certify, from_torch


class Classifier(nn.Module):
    """Self-attention, mean pooling, linear readout."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.readout = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch (b, n, d)."""
        logits: Tensor = self.readout(self.attention(x, x, x, need_weights=False)[0].mean(dim=1))
        return logits


def certified_radii(model: Classifier, inputs: Tensor, labels: Tensor) -> list[float]:
    """Radius within which no move of an input's tokens changes its label; 0 where the label is already wrong."""
    model.eval()
    layer = from_torch(model.attention)
    radii = []
    for tokens, label in zip(inputs, labels.tolist(), strict=True):
        goal = Margin(model.readout.weight, model.readout.bias, pool="mean", label=label)
        try:
            best = certify(Problem(layer, TokenMeasure(tokens), FrobeniusBall(), goal)).best
        except AlreadyViolatedError:
            best = None
        radii.append(0.0 if best is None else best.radius)
    model.train()
    return radii


def train(model: Classifier, x: Tensor, y: Tensor, *, epochs: int, callback: Callable[[int], None]) -> None:
    """The usual loop."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for epoch in range(epochs):
        for batch in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
        callback(epoch)


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 6, 8)
    y = (x[:, :, 0].mean(dim=1) > 0).long()
    model = Classifier()

    def watch(epoch: int) -> None:
        radii = certified_radii(model, x[:4], y[:4])
        accuracy = float((model(x).argmax(dim=1) == y).float().mean())
        print(f"epoch {epoch}: accuracy {accuracy:.3f}, median certified radius {statistics.median(radii):.4f}")

    train(model, x, y, epochs=3, callback=watch)


if __name__ == "__main__":
    main()
