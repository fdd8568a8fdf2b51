"""Tests that run without the shape checks of ``tests.conftest``: those refuse an argument before the package sees it."""
