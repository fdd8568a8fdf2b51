"""Tests that run without the shape checks of ``tests.conftest``: those refuse arguments before the package does."""
