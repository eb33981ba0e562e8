"""What a person looks at: plots, videos, the report."""
