"""Margin certificates: a proved quadratic majorant of the drop and its trust region."""
