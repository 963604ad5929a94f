"""The host's kernel: routes, devices and addresses, and keeping them as they should be."""
