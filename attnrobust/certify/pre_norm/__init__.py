"""Certificates of attention whose tokens move before the normalisation of its block."""
