"""Plots, videos and reports."""
