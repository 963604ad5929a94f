"""Nonsense for etcd that looks like leases more or less."""

import json
import random

IPS: list[object] = ["10.97.0.1", "10.97.0.99", "127.0.0.1", "::1", None, 5, "x\n"]
MACS: list[object] = ["02:00:00:00:00:01", "ff:ff:ff:ff:ff:ff", "", "\n", "02:0", 7, None, []]

VALUE = (
    '{"PublicIP":"10.97.0.77","BackendType":"vxlan","BackendData":{"VtepMAC":"02:00:00:00:00:77"}}'
)


def nonsense(source: random.Random) -> str:
    """A value that looks like a lease more or less; now and then only its key is wrong."""
    if source.random() < 0.05:
        return VALUE
    mac = source.choice(MACS)
    value: dict[str, object] = {
        "PublicIP": source.choice(IPS),
        "BackendType": source.choice(["vxlan", "host-gw", "", "udp\nE1122", None, 3]),
        "BackendData": source.choice([{"VtepMAC": mac}, None, "x", [[]], {"VtepMAC": [mac]}]),
        "more": source.randbytes(source.choice([0, 10, 4000])).hex(),
    }
    text = json.dumps(value)
    cut = source.choice([len(text), len(text), source.randrange(len(text))])
    return text[:cut] + source.choice(["", "", "\x00", "[" * 3000])
