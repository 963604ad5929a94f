"""Inputs from outside keep their promises: those once found by searching, and new ones each run."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz.seeds import SEEDS
from fuzz.targets import TARGETS
from fuzz.tunnel import RECORD

CORPUS = Path(__file__).parent / "corpus"

# Input that once broke a promise is kept under a name of its own.
KEPT = {name: sorted((CORPUS / name).iterdir()) for name in TARGETS}


@pytest.mark.parametrize("name", TARGETS)
def test_the_seeds_and_everything_once_found_keep_the_promises(name: str) -> None:
    assert KEPT[name], "the corpus is not there"
    for data in [*SEEDS[name], *(path.read_bytes() for path in KEPT[name])]:
        TARGETS[name](data)


@st.composite
def mutated(draw: st.DrawFn, name: str) -> bytes:
    """Valid input with some bytes changed, cut out, doubled or taken from other input."""
    seeds = st.sampled_from(SEEDS[name])
    data = draw(seeds)
    for _ in range(draw(st.integers(1, 4))):
        begin = draw(st.integers(0, len(data)))
        end = min(len(data), begin + draw(st.integers(0, 40)))
        other = draw(seeds)
        middle = draw(
            st.sampled_from([b"", data[begin:end] * 2, other, other[begin:end], b"\xff" * 4])
            | st.binary(max_size=8)
        )
        data = data[:begin] + middle + data[end:]
    return data


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_valid_input_that_was_damaged(name: str, data: st.DataObject) -> None:
    TARGETS[name](data.draw(mutated(name)))


addresses = st.sampled_from(["10.5.0.0", "10.5.17.0", "10.5.16.9", "10.97.0.2", "10.6.0.0", "::1"])
lengths = st.integers(-1, 34).map(str)
networks = st.builds("/".join, st.tuples(addresses, lengths))
scalars = st.none() | st.booleans() | st.integers(-9, 70_000) | st.floats() | st.text(max_size=4)
values = scalars | addresses | networks | st.integers(0, 10**25)
anything = st.recursive(
    values,
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)


def some(*names: str) -> st.SearchStrategy[dict[str, object]]:
    """Objects with some of these members, of any type."""
    return st.dictionaries(st.sampled_from(names), anything)


backends = some("VNI", "Port", "GBP", "Learning", "DirectRouting", "MTU", "mtu", "SourceCheck")
configs = st.builds(
    lambda usual, more, kind, backend: {**usual, **more, "Backend": {"Type": kind, **backend}},
    st.fixed_dictionaries({"Network": st.just("10.5.0.0/16") | networks}),
    some("SubnetLen", "SubnetMin", "SubnetMax", "subnetmin", "EnableIPv6", "Networks", "Backend"),
    st.sampled_from(["vxlan", "udp", "host-gw", "UDP", "alloc", "\ud800"]) | st.text(),
    backends,
)


@settings(max_examples=100, deadline=None)
@given(configs)
def test_configs_of_known_names_and_any_values(document: dict[str, object]) -> None:
    TARGETS["config"](json.dumps(document).encode())


keys = st.builds("-".join, st.tuples(addresses, lengths)) | st.text(max_size=30)
attributes = st.builds(
    lambda usual, more: json.dumps({**usual, **more}),
    st.fixed_dictionaries(
        {"PublicIP": addresses | values},
        optional={
            "BackendType": st.just("vxlan") | scalars,
            "BackendData": some("VtepMAC", "vtepmac")
            | st.fixed_dictionaries({"VtepMAC": st.from_regex(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")}),
        },
    ),
    some("publicip", "backenddata"),
)


@settings(max_examples=100, deadline=None)
@given(keys, attributes)
def test_leases_of_known_names_and_any_values(key: str, value: str) -> None:
    data = f"{key}\n{value}".encode(errors="replace")
    TARGETS["lease"](data)


steps = st.builds(
    lambda kind, name, index, ttl, value: f"{kind} {name} {index} {ttl} {value}",
    st.sampled_from("ssdnnSSAt"),
    st.integers(0, 5) | st.just("foo/bar"),
    st.integers(0, 30),
    st.integers(0, 90) | st.just(""),
    attributes | st.sampled_from(['{"PublicIP":"10.97.0.2"}', '{"PublicIP":"10.97.0.3"}']),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(steps, max_size=30))
def test_stores_that_say_anything_in_any_order(program: list[str]) -> None:
    TARGETS["watch"]("\n".join(program).encode(errors="replace"))


datagrams = st.builds(
    lambda sender, times, size, packet: RECORD.pack(sender, times, size, len(packet)) + packet,
    st.integers(0, 2),
    st.integers(0, 70),
    st.integers(0, 400),
    st.sampled_from(SEEDS["tunnel_receive"]).map(lambda seed: seed[RECORD.size :])
    | st.binary(max_size=60),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(datagrams, max_size=8))
def test_datagrams_of_any_senders_in_any_order(received: list[bytes]) -> None:
    TARGETS["tunnel_receive"](b"".join(received))
