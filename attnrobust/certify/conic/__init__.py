"""Margin certificate ``conic-margin`` of small layers by a conic program."""
