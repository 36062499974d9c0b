"""kvtool generate."""
