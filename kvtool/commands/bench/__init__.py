"""kvtool bench."""
