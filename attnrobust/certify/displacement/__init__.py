"""Displacement certificate: exact first order, proved second-order remainder."""
