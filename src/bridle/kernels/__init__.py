"""The same arithmetic, faster, on a CPU. The modules' own code stays the reference; see `quicken`."""
