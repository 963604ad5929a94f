"""Masquerade and forward rules: what they are, three ways to write them, and who keeps them."""
