"""What a model will take, from its configuration alone: no weights are read, no torch is loaded."""
