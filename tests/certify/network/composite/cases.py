"""A network at an input, prepared with everything over bases."""

from dataclasses import dataclass

import torch
from torch import Tensor

from attnrobust.certify.network.composite.preparation import Preparation, Settings
from attnrobust.certify.network.composite.second_order import Moves
from attnrobust.certify.network.composite.targets import Readout
from attnrobust.layers.graph import NetworkGraph

SETTINGS = Settings(sketch=16, pairs=16, seed=0, own_metrics=True)


@dataclass(frozen=True, eq=False)
class Case:
    """A network at an input, and the tokens that move."""

    graph: NetworkGraph
    x: Tensor
    mass: Tensor | None = None
    movable: Tensor | None = None

    def prepared(self) -> Preparation:
        record = self.graph.linearise(self.x, self.mass)
        movable = torch.ones(self.x.shape[0], dtype=torch.bool) if self.movable is None else self.movable
        clean = record.clean[self.graph.output]
        readout = Readout(self.graph.output, (clean.shape[0], clean.shape[1]))
        return Preparation(record, Moves(movable, self.x.shape[1]), readout, SETTINGS)
