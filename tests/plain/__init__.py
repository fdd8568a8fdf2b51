"""Tests without the shape checks of ``tests.conftest``, which refuse an argument before the package sees it."""
