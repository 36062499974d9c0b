"""Models in folders: weights, configuration and tokenizers, also of Hugging Face and GGUF."""
