"""Training a control on a cache: pure objective, keyed draws, a loop, and checkpoints that survive a kill."""
