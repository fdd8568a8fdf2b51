"""Numbers and linear algebra: sides and rounding, operators and their norms, optimal transport, ball arithmetic."""
