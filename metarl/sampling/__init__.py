"""Sampling: random streams, rollouts and worker processes."""
