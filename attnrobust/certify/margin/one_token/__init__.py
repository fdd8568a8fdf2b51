"""Margin certificate ``margin-one-token``: one token moves."""
