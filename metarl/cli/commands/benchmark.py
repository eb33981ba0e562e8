"""Measure sampling and training speed against the physics ceiling."""

from metarl.cli.training import Benchmark, benchmark

__all__ = ["IMPORTS", "Benchmark", "benchmark"]

IMPORTS = ("metarl.evaluation.benchmark",)
