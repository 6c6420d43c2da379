"""Control files: what a trained control is on disk."""
