"""The control itself: the block and its equation, hint encoders, residuals, the U-Net's control, and attaching it."""
