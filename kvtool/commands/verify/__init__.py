"""kvtool verify-cache and verify-logits."""
