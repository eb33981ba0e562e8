"""Reinforcement and supervised learning: two implementations of one interface."""
