"""kvtool: the workbench for KV caches."""

__version__ = "0.1.0"
