"""Input from outside, made up by machines."""
