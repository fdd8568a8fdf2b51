"""Margin certificate ``margin-majorant``: all movable tokens together."""
