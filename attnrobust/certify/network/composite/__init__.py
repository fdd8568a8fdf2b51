"""Whole networks by the derivatives of every prefix map as one object; docs/network-composite.md."""
