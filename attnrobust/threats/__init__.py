"""What the adversary may change: each threat owns its distance and its projection."""
