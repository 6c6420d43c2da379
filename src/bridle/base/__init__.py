"""The locked model: finding it, loading it, and its frozen encoders."""
