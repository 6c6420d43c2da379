"""Pictures: the stock pipeline steered by controls, and PNG files that carry their settings."""
