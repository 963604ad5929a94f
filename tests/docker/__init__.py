"""Tests with a real dockerd on each of two hosts. They need root."""
