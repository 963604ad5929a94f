"""The programs of the fast path, which the kernel runs on packets. Pure.

What they are for is told in `fastpath`. They take only packets that need nothing but what they do,
and leave every other one alone, unchanged: it goes its usual way, through the tunnel's process.

To use `bpf_fib_lookup` a program has to say that it may be used under the GPL. These, the text of
this module, may be used under version 2 of it, too.
"""

from flanneld.backend.udp import program_steps as steps
from flanneld.backend.udp.packet import WHOLE_BYTES
from flanneld.backend.udp.program_steps import Path
from flanneld.kernel import bpf_skb as skb
from flanneld.kernel.bpf_asm import Assembler, If, Reg, Size

R0, R1, R2, R3, R4 = Reg.R0, Reg.R1, Reg.R2, Reg.R3, Reg.R4
R6, R7, R8, R9, FP = Reg.R6, Reg.R7, Reg.R8, Reg.R9, Reg.FP
B, H, W = Size.B, Size.H, Size.W


def egress(path: Path) -> bytes:
    """The program for what the TUN device is about to send: into a datagram, and to the peer."""
    a = Assembler()
    outer, fib = -64, -144
    inner, ethernet = outer + steps.OUTER, outer - steps.ETHERNET
    a.mov(R6, R1)
    steps.only_ipv4(a)
    skb.load(a, 0, inner, steps.OUTER)
    a.load(W, R8, R6, skb.LEN)
    a.jump(If.GT, R8, steps.LONGEST, "pass")
    steps.only_plain(a, inner)
    steps.decrement_ttl(a, inner)
    a.load(W, R3, FP, inner + 16)
    steps.find_peer(a, path.peers)
    a.call(skb.KTIME)
    a.mov(R7, R0)
    steps.only_to_the_fast(a, inner)
    steps.check_route(a, path, fib)
    skb.copy(a, (R9, steps.PEER_ETHERNET), (FP, ethernet), steps.ETHERNET)
    a.jump(If.NE, R7, 0, "addressed")
    # Whatever is there must not look like a group's address.
    a.store(H, FP, ethernet, 0)
    a.label("addressed")
    steps.write_outer(a, path, outer)
    skb.adjust_room(a, steps.OUTER, skb.ROOM_MAC, skb.FIXED_GSO | skb.ENCAP_IPV4 | skb.ENCAP_UDP)
    a.jump(If.NE, R0, 0, "pass")
    a.mov(R1, R6)
    a.mov(R2, steps.ETHERNET)
    a.mov(R3, 0)
    a.call(skb.CHANGE_HEAD)
    a.jump(If.NE, R0, 0, "drop")
    # Up to the inner header's checksum.
    skb.store(a, 0, ethernet, steps.ETHERNET + steps.OUTER + 12)
    # The mark was about the inner packet.
    a.mov(R1, 0)
    a.store(W, R6, skb.MARK, R1)
    steps.count(a, path.counters, steps.SENT)
    a.mov(R1, path.external)
    a.mov(R2, 0)
    a.jump(If.EQ, R7, 0, "neighbour")
    a.call(skb.REDIRECT)
    a.exit()
    # Takes the Ethernet header off, looks for the neighbour and writes another.
    a.label("neighbour")
    a.mov(R3, 0)
    a.mov(R4, 0)
    a.call(skb.REDIRECT_NEIGH)
    a.exit()
    skb.end_with(a, "drop", skb.DROP)
    skb.end_with(a, "pass", skb.NEXT)
    return a.assemble()


def ingress(path: Path) -> bytes:
    """The program for what the external interface has received: out of the datagram, and on.

    As if it had come from the TUN device; TCP by the inlet, if there is one, and `joined`. But a
    super-packet, which only a virtual link brings whole, goes to the tunnel's process, with
    `WHOLE_BYTES` before it: nothing here can make the kernel forget that a packet was in a tunnel,
    and by that it goes wrong when it is cut.
    """
    a = Assembler()
    outer, head = -64, -92
    inner = outer + steps.OUTER
    a.mov(R6, R1)
    steps.only_ipv4(a)
    a.load(W, R1, R6, skb.VLAN_PRESENT)
    a.jump(If.NE, R1, 0, "pass")
    # A mirror port's, say.
    a.load(W, R1, R6, skb.PACKET_TYPE)
    a.jump(If.NE, R1, skb.PACKET_HOST, "pass")
    skb.load(a, steps.ETHERNET, outer, 2 * steps.OUTER)
    steps.only_to_us(a, path, outer)
    steps.only_plain(a, inner)
    steps.decrement_ttl(a, inner)
    # From the peer whose subnet it says it is from?
    a.load(W, R3, FP, inner + 12)
    steps.find_peer(a, path.peers)
    a.load(W, R1, R9, steps.PEER_IP)
    a.load(W, R2, FP, outer + 12)
    a.jump(If.NE, R1, R2, "pass")
    steps.only_fast(a, outer)
    a.load(W, R1, R6, skb.GSO_SIZE)
    a.jump(If.NE, R1, 0, "whole")
    skb.adjust_room(a, -steps.OUTER, skb.ROOM_MAC, skb.FIXED_GSO)
    a.jump(If.NE, R0, 0, "pass")
    skb.store(a, steps.ETHERNET + 8, inner + 8, 4)
    steps.count(a, path.counters, steps.RECEIVED)
    if path.inlet:
        a.load(B, R1, FP, inner + 9)
        a.jump(If.NE, R1, steps.TCP, "direct")
        # By it the flows are told apart that are joined side by side; no card knows the inner one.
        a.mov(R1, R6)
        a.call(skb.HASH)
        a.mov(R1, path.inlet)
        a.mov(R2, 0)
        a.call(skb.REDIRECT)
        a.exit()
        a.label("direct")
    steps.receive_from(a, path.tun)
    a.label("whole")
    a.load(B, R2, FP, inner + 9)
    steps.write_whole(a, path, outer, head)
    skb.adjust_room(a, WHOLE_BYTES, skb.ROOM_NET, skb.FIXED_GSO)
    a.jump(If.NE, R0, 0, "pass")
    skb.store(a, steps.ETHERNET, outer, 12)
    skb.store(a, steps.ETHERNET + steps.IP, head, 8 + WHOLE_BYTES)
    skb.store(a, steps.ETHERNET + steps.OUTER + WHOLE_BYTES + 8, inner + 8, 4)
    skb.end_with(a, "pass", skb.NEXT)
    skb.end_with(a, "drop", skb.DROP)
    return a.assemble()


def joined(tun: int) -> bytes:
    """The program for what comes out of the link behind the inlet: as if from the TUN device."""
    a = Assembler()
    a.mov(R6, R1)
    steps.only_ipv4(a)
    steps.receive_from(a, tun)
    # Not from us.
    skb.end_with(a, "pass", skb.DROP)
    return a.assemble()
