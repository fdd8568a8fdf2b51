"""What several certificates need: reach of a threat, sizes of heads, first-order changes."""
