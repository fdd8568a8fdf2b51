"""Displacement certificate: one product with the joint form, ``sum_k c_k (squared linear image k)``, in one pass."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.displacement.base import MovingRows
from attnrobust.certify.displacement.bilinear import QueryKeyForm, ValueLogitForm
from attnrobust.certify.displacement.remainder import LogitForms, RemainderMajorant
from attnrobust.layers.jacobian import from_heads, to_heads


@dataclass(frozen=True, eq=False)
class JointProduct:
    """The five forms of eq. 19: first order ``|J D|^2``, logit form, value-logit form, query-key form, query form.

    All of them read the same projections of the move and the same centred logit change, so they share one pass. What no
    form changes is computed once, in the clean rows.

    Args:
        rows: The clean rows.
        majorant: Holds the cumulant moduli.
        value_form: The value-logit form.
        key_form: The query-key form.
    """

    rows: MovingRows
    majorant: RemainderMajorant
    value_form: ValueLogitForm
    key_form: QueryKeyForm

    def with_values(self, form: ValueLogitForm) -> "JointProduct":
        """The same with another value-logit form."""
        return replace(self, value_form=form)

    def _change(self, dq: Tensor, dk: Tensor) -> Float[Tensor, "h n n"]:
        """The centred logit change l of projected moves."""
        layer = self.rows.clean.layer
        dq, dk = layer.turned(dq), layer.turned(dk)
        change = dq @ self.rows.clean.keys.transpose(-1, -2) + self.rows.clean.queries @ dk.transpose(-1, -2)
        centred: Tensor = change - torch.linalg.vecdot(self.rows.clean.weight, change, dim=-1)[..., None]
        return centred

    def _pair(self, change: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
        """X_h of one head (eq. 17) at a move with this logit and value change, before it is projected back."""
        gamma = dv @ self.rows.clean.value_gram * self.value_form.value_weight[:, None, None]
        return self.value_form.logit_weight * change, gamma

    def _pair_squared(self, change: Tensor, dv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``X_h^2`` before it is projected back, and ``sum_h |X_h D|^2``."""
        layer, (paired, gamma) = self.rows.clean.layer, self._pair(change, dv)
        paired = paired - self.rows.clean.weight * paired.sum(dim=-1, keepdim=True)
        inner = torch.cat([*self._pulled(paired), gamma], dim=-1)
        inner = inner * self.rows.moves[:, None]
        image = inner @ self.rows.clean.projection_gram
        dq, dk, dv = image.split([layer.key_width, layer.key_width, layer.value_width], dim=-1)
        return *self._pair(self._change(dq, dk), dv), (inner * image).sum()

    def _pulled(self, logit: Float[Tensor, "h n n"]) -> tuple[Tensor, Tensor]:
        """Transpose of ``_change`` without its centring: to projected moves of queries and keys."""
        clean = self.rows.clean
        query, key = logit @ clean.keys, logit.transpose(-1, -2) @ clean.queries
        return clean.layer.turned_back(query), clean.layer.turned_back(key)

    def apply(
        self, moves: Float[Tensor, "n d"], forms: LogitForms, factors: Float[Tensor, "5"]
    ) -> tuple[Float[Tensor, "n d"], Float[Tensor, "5"]]:
        """Half the gradient of ``sum_k factors_k X_k`` at a move, and the five values ``X_k``.

        Args:
            moves: The move; what it does to tokens that must not move is ignored.
            forms: Coefficients of the logit form and of the query form.
            factors: Weights of the five forms.
        """
        rows, layer, w = self.rows, self.rows.clean.layer, self.rows.clean.weight
        mask = rows.moves[:, None]
        heads = layer.heads
        into, widths = rows.clean.into_heads
        parts = ((moves * mask) @ into).split(widths, dim=-1)
        dq, dk, dv, left, right = (to_heads(part, heads) for part in parts)
        change = self._change(dq, dk)
        output = self._pool(layer.combine(w @ dv + (w * change) @ rows.clean.plain_values))
        back = self._unpool(output)
        image = forms.extra * change
        if self.majorant.small:
            image = image + forms.exact[..., None] * (self.majorant.modulus @ change[..., None])[..., 0]
        image = forms.multiplier[..., None] * image
        paired, gamma, pair_value = self._pair_squared(change, dv)
        query = left * self.key_form.query_weight[..., None]
        key = right * self.key_form.key_weight[:, None, None]
        imaged = left * forms.query[..., None] * self.rows.clean.query_scale[:, None]
        values = torch.stack([
            output.square().sum(), (image * change).sum(), pair_value,
            (query * left).sum() + (key * right).sum(), (imaged * left).sum(),
        ])  # fmt: skip

        logit = factors[0] * (w * (back @ rows.clean.plain_values.transpose(-1, -2))) + factors[1] * image
        logit = logit + factors[2] * paired
        logit = logit - w * logit.sum(dim=-1, keepdim=True)
        out = (
            *self._pulled(logit),
            factors[0] * (w.transpose(-1, -2) @ back) + factors[2] * gamma,
            factors[3] * query + factors[4] * imaged,
            factors[3] * key,
        )
        return torch.cat([from_heads(part) for part in out], dim=-1) @ into.T * mask, values

    def _pool(self, output: Tensor) -> Tensor:
        return output if self.rows.row_weights is None else self.rows.row_weights @ output

    def _unpool(self, output: Tensor) -> Float[Tensor, "h n v"]:
        layer = self.rows.clean.layer
        if self.rows.row_weights is not None:
            output = self.rows.row_weights[:, None] * output
        flat = output if layer.w_o is None else output @ layer.w_o.flatten(0, 1).T
        return to_heads(flat, layer.heads)
