"""The built-in families of environments."""
