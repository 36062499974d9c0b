"""What a step costs, and what a cache costs in quality."""
