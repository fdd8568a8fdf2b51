"""Certificates of whole networks."""
