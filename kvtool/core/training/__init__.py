"""Training runs, and the tasks that they learn."""
