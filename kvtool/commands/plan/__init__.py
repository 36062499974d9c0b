"""What a model will take, before it runs."""
