"""Families of supervised tasks."""
