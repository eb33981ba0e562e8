"""Checks of a task family."""
