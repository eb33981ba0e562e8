"""Runs from config to results: presets, training, run folders, evaluation, benchmark."""
