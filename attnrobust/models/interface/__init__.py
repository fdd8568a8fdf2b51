"""Attention layers read at transformers' attention interface, where every model hands over queries, keys and values."""
