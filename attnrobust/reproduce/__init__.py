"""The experiments of the papers behind this package, each by one command: data, table, figure and verdict."""
