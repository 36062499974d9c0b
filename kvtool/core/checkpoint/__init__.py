"""Models in folders: weights, configuration, tokenizers, and the families of other projects."""
