"""Cached against uncached: scenarios, three precisions, a verdict, and where the bug is."""
