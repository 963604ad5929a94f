"""The etcd v2 store and the subnet manager against a real etcd on loopback. No root needed."""
