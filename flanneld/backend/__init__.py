"""Backends: how packets get to the other hosts' subnets."""
