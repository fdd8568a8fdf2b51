"""Attention layers other than dot-product attention."""
