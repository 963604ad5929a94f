"""Subnets and who holds them: the network config, leases, and the store that keeps both."""
