"""Right and wrong values of every kind that a caller may hand in."""

import random
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch

SCALES = (*(1.0,) * 12, 1e-320, 1e-308, 1e-160, 1e-30, 1e-8, 1e3, 1e10, 1e30, 1e150, 1e160, 1e300, 1e308)
NUMBERS: tuple[Any, ...] = (
    float("nan"), float("inf"), -1, 0, -0.0, "1", "", None, [], True, 1e-320, 1e308, 10**400, 2**63, np.float64(0.5),
    np.float32(2), np.int64(3), torch.tensor(1.0), torch.ones(2), complex(1, 1), Decimal("0.5"), Fraction(1, 3), {},
    b"1", object(), np.array([0.1]), np.array("x"), np.datetime64("2020-01-01"), 1.5, 3,
)  # fmt: skip
THREATS = (
    "frobenius", "per-token", "per-token-linf", "per-token-l1", "any-token", "token:0", "tokens:0,1", "per-token:0",
    "coupling:1", "coupling:2", "coupling:inf", "wasserstein:1", "wasserstein:2", "wasserstein:inf",
    "wasserstein:2:within:50", "coupling:2:within:9:tokens:0", "copies:1", "copies:2:per-token", "copies:1:strict",
)  # fmt: skip
WRONG_TEXTS = (
    "", " ", ":", "frobenious", "per-tokn", "token:-1", "token:99", "tokens:", "tokens:0,,1", "token:1e3", "token:٣",
    "tokens:0,0", "coupling:3", "wasserstein:2:within:nan", "wasserstein:2:within:-1", "wasserstein:2:within:1e999",
    "copies:0", "copies:-1", "copies:999999999999999999999", "copies:x", "copies:1:copies:1", "token:" + "9" * 40,
    "[/INST] [bold]", "😀", "a\nb", "\x00", "\ud800", "x" * 5000, "frobenius\n", "FROBENIUS", "foolbox:",
    "foolbox:Nope", "nan%", "-1%", "1e400", "0", "0%", "5 %", "१०%", "1%%", "row:", "row:-1", "row:99",
    "row:" + "9" * 5000,
)  # fmt: skip
CERTIFICATES = (
    "castin2024-derived", "castin2024-reported", "spread-lipschitz", "havens2024-local", "displacement", "kim2021-l2",
    "cosine-lipschitz", "sigmoid-ball", "dasoulas2021-lipschitznorm", "margin-majorant", "margin-one-token",
    "measure-ball", "measure-local", "measure-copies", "singla2020-curvature", "measure-curvature", "rigorous-local",
)  # fmt: skip


class Values:
    """Draws of one call; with the chance ``wild`` an argument is wrong.

    Args:
        random: Where everything comes from.
    """

    def __init__(self, random: random.Random) -> None:
        self.random = random
        self.numpy = np.random.default_rng(random.getrandbits(64))
        self.wild = random.choice((0.0, 0.0, 0.04, 0.15))
        self.scale = random.choice(SCALES)

    def pick(self, among: Sequence[Any]) -> Any:
        """One of them."""
        return among[self.random.randrange(len(among))]

    def wrong(self) -> bool:
        """Whether the next argument is wrong."""
        return self.random.random() < self.wild

    def rarely(self, chance: float = 0.2) -> bool:
        """A rare event."""
        return self.random.random() < chance

    def number(self, right: Sequence[Any]) -> Any:
        """One of the right numbers, or anything."""
        return self.pick(NUMBERS) if self.wrong() else self.pick(right)

    def text(self, right: Sequence[str]) -> Any:
        """One of the right names, or a wrong one."""
        return self.pick((*WRONG_TEXTS, *NUMBERS)) if self.wrong() else self.pick(right)

    def array(self, *shape: int, scale: float | None = None) -> Any:
        """Numbers of this shape in one of many containers, or something else."""
        with np.errstate(all="ignore"):
            plain = self.numpy.normal(size=shape) * (self.scale if scale is None else scale)
        return self._wrong_array(plain) if self.wrong() else self._container(plain)

    def _container(self, plain: Any) -> Any:
        kind = self.random.randrange(10)
        if kind == 0:
            return plain
        if kind == 1:
            return plain.tolist()
        if kind == 2:
            with np.errstate(all="ignore"):
                return plain.astype(self.pick((np.float32, np.float16, ">f8", np.longdouble)))
        if kind == 3:
            return torch.tensor(plain).to(self.pick((torch.float32, torch.float16, torch.bfloat16)))
        if kind == 4:
            return torch.nn.Parameter(torch.tensor(plain))
        if kind == 5:
            return plain[::-1]
        return torch.tensor(plain)

    def _wrong_array(self, plain: Any) -> Any:
        tensor = torch.tensor(plain)
        return self.pick((
            lambda: _with(tensor, float("nan")),
            lambda: _with(tensor, float("inf")),
            lambda: tensor[:0],
            lambda: tensor[..., :0],
            lambda: tensor[None],
            lambda: tensor[0] if tensor.ndim else tensor,
            lambda: tensor.reshape(-1),
            lambda: torch.cat([tensor, tensor]),
            lambda: tensor.to(torch.complex128),
            lambda: plain.astype(complex),
            lambda: tensor > 0,
            lambda: torch.ones_like(tensor, dtype=torch.int64),
            lambda: np.ones(plain.shape, dtype=np.int32),
            lambda: np.ones(plain.shape, dtype=np.uint16),
            lambda: plain.astype(object),
            lambda: np.full(plain.shape, None),
            lambda: plain.astype(str),
            lambda: np.ma.masked_less(plain, 0),
            lambda: np.zeros(plain.shape, dtype="M8[s]"),
            lambda: np.zeros(plain.shape, dtype=[("a", "f8")]),
            tensor.to_sparse,
            lambda: tensor.to("meta"),
            lambda: tensor.to(torch.float8_e4m3fn),
            lambda: [[1.0, 2.0], [3.0]],
            lambda: "text",
            lambda: {"a": 1},
            lambda: {1, 2},
            lambda: (x for x in (1.0, 2.0)),
            object,
            lambda: None,
            lambda: 1.0,
            lambda: torch.zeros_like(tensor),
            lambda: [[10**400]],
            lambda: [tensor, tensor],
        ))()  # fmt: skip


def _with(tensor: torch.Tensor, value: float) -> torch.Tensor:
    changed = tensor.clone().reshape(-1)
    changed[-1:] = value
    return changed.reshape(tensor.shape)
