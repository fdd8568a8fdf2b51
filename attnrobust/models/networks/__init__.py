"""Whole models as exact network graphs: one reader per architecture, checked against the model's own forward pass."""
