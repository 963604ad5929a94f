"""The udp backend: a tunnel in user space, one process per host.

A datagram between hosts holds exactly one inner IPv4 packet and nothing else, as in every flannel
since the first. Only the tunnel's own process (``tunnel``) imports numpy.
"""
