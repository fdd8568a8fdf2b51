"""The largest derivative at an input or over a ball: every bound from above, and searches from below."""
