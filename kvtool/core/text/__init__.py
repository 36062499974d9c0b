"""Tokenizers and chat templates: from text to token ids and back."""
