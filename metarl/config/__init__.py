"""Options and presets of a run."""
