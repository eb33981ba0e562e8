"""Families over MuJoCo models, stepped in one batch."""
