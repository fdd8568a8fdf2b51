"""The bounds of one state's move sharpen each other."""

import math

import torch

from attnrobust.certify.network.node_bounds.state_move import no_move, scaled_move, state_move, token_move

TOKENS = torch.tensor([3.0, 4.0], dtype=torch.float64)


def test_tokens_whole_and_entries_sharpen_each_other() -> None:
    entries = torch.tensor([[0.3, 0.4], [9.0, 9.0]], dtype=torch.float64)
    move = state_move(100.0, TOKENS, entries)
    assert torch.allclose(move.tokens, torch.tensor([0.5, 4.0], dtype=torch.float64))
    assert move.frobenius == float(torch.linalg.vector_norm(move.tokens))
    assert torch.equal(move.entries[1], torch.tensor([4.0, 4.0], dtype=torch.float64))
    small = move.within(1.0)
    assert small.frobenius == 1.0
    assert float(small.tokens.max()) == 1.0


def test_what_is_not_a_number_says_nothing() -> None:
    move = state_move(math.nan, TOKENS * math.nan, torch.full((2, 3), math.nan, dtype=torch.float64))
    assert move.frobenius == math.inf
    assert bool(torch.isinf(move.tokens).all())
    assert token_move(2.0, TOKENS, 3).meet(move).frobenius == 2.0


def test_a_bound_of_scaled_rows_bounds_tokens() -> None:
    factors = torch.tensor([1.0, 0.1], dtype=torch.float64)
    move = state_move(100.0, 50.0 * TOKENS, TOKENS[:, None].expand(-1, 2) * 50.0, scaled=(factors, 2.0))
    assert torch.allclose(move.tokens, torch.tensor([2.0, 20.0], dtype=torch.float64))
    assert move.plus(no_move(move.entries)).scaled is None


def test_slopes_scale_every_bound() -> None:
    move = scaled_move(token_move(5.0, TOKENS, 2), torch.tensor([[2.0, 1.0], [0.0, 0.0]], dtype=torch.float64))
    assert move.tokens.tolist() == [6.0, 0.0]
    assert move.entries.tolist() == [[6.0, 3.0], [0.0, 0.0]]
