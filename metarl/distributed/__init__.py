"""Process groups and thread pools."""
