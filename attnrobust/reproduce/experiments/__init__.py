"""One short file for each experiment."""
