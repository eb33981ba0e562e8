"""Meta-policies and adapted policies."""
