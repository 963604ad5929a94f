"""flannel's host daemon in Python."""

__version__ = "0.1.0"
