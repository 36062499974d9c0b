"""Where a bug is, and what kind of bug."""
