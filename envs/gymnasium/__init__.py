"""Families over Gymnasium environments."""
