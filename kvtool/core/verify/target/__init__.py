"""A user's own decoder as a subject."""
