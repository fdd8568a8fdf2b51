"""Randomized smoothing: a second model, the majority decision under Gaussian noise on the tokens, with both radii.

Nothing here speaks about the model itself, and nothing of the model's own certificates speaks about this one.
"""

from attnrobust.smoothing.record import SmoothedComparison, Smoothing
from attnrobust.smoothing.smooth import smooth

__all__ = ["SmoothedComparison", "Smoothing", "smooth"]
