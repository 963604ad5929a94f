"""The generation of the host's nf_tables rules, which spares a listing while nothing has changed.

The kernel counts every transaction that changes anything in the nf_tables of a network namespace,
those of iptables' nft variant included. The legacy iptables' tables are elsewhere. Layouts and
constants are those of linux/netfilter/nfnetlink.h and linux/netfilter/nf_tables.h.
"""

import socket
import struct
from collections.abc import Callable

from flanneld.kernel.wire import NLM_F_REQUEST, split_attributes, split_messages

# Of so many checks one is complete, whatever the generation says: with checks every 5 s, once a
# minute. It begins anew when the module is loaded anew, and a transaction is counted a moment
# before all of it shows.
COMPLETE_EVERY = 12

_NETLINK_NETFILTER = 12
_NFNL_SUBSYS_NFTABLES = 10
_NFT_MSG_NEWGEN = _NFNL_SUBSYS_NFTABLES << 8 | 15
_NFT_MSG_GETGEN = _NFNL_SUBSYS_NFTABLES << 8 | 16
_NFTA_GEN_ID = 1

# Header and struct nfgenmsg.
_REQUEST = struct.Struct("=IHHII BBH")
_NFGENMSG_SIZE = 4
_GEN_ID = struct.Struct(">I")

_RECEIVE = 4096
# Seconds. The kernel answers within the request, so this is for one that does not.
_TIMEOUT = 1.0


def pack_request(seq: int) -> bytes:
    """Return the message that asks for the generation."""
    return _REQUEST.pack(_REQUEST.size, _NFT_MSG_GETGEN, NLM_F_REQUEST, seq, 0, 0, 0, 0)


def parse_answer(data: bytes, seq: int) -> int | None:
    """Return the generation; None if this is not the answer, or not all of it."""
    for offset, end, kind, _, answered, _ in split_messages(data):
        if kind != _NFT_MSG_NEWGEN or answered != seq:
            continue
        for attribute, start, size in split_attributes(data, offset + _NFGENMSG_SIZE, end):
            if attribute == _NFTA_GEN_ID and size == _GEN_ID.size:
                return int(_GEN_ID.unpack_from(data, start)[0])
    return None


def read_generation() -> int | None:
    """Ask the kernel, in the present network namespace; needs CAP_NET_ADMIN.

    None if it refuses or does not know the question. To be asked only where nf_tables are in use:
    the question would load them.
    """
    try:
        with socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER
        ) as sock:
            sock.settimeout(_TIMEOUT)
            sock.send(pack_request(1))
            return parse_answer(sock.recv(_RECEIVE), 1)
    except OSError:
        return None


class Generation:
    """Spares the checks of rules in nf_tables while these are as at the last good one."""

    def __init__(self, read: Callable[[], int | None] = read_generation) -> None:
        self._read = read
        self._good: int | None = None
        self._left = 0

    def check(self, complete: Callable[[], bool]) -> bool:
        """Whether all is as wanted: what ``complete`` says, or said of this very generation."""
        # Before the check: what changes during it is not taken for seen.
        generation = self._read()
        if self._left and generation is not None and generation == self._good:
            self._left -= 1
            return True
        self._good, self._left = None, 0
        if not complete():
            return False
        self._good, self._left = generation, COMPLETE_EVERY - 1
        return True
