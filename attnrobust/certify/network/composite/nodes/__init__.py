"""Proved bounds of what one node adds beyond its first or second order."""
