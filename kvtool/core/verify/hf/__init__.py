"""Models and caches of transformers as subjects."""
