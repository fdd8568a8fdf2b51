"""Attacks on token measures: atoms, masses and the goals read from them."""
