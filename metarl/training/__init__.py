"""The loop over meta-iterations."""
