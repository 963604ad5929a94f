"""A soak: hosts whose containers ping each other, and one random fault after another."""
