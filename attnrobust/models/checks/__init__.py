"""What is checked before a model is believed: its files, its calls, and its own forward pass."""
