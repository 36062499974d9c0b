"""The decode loop, and the forms that a step of it takes."""
