"""The command line; it parses, prints and sets exit codes, and does no mathematics."""

from attnrobust.cli.app import app, main, run
from attnrobust.cli.exits import ExitCode

__all__ = ["ExitCode", "app", "main", "run"]
