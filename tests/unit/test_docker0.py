"""What flanneld says about docker's bridge."""

import errno
import logging
import threading
from ipaddress import IPv4Interface, IPv4Network

import pytest

from flanneld import docker0
from flanneld.docker0 import Watch, judge

NETWORK = IPv4Network("10.5.0.0/16")
SUBNET = IPv4Network("10.5.72.0/24")


@pytest.mark.parametrize(
    "found",
    [None, "10.5.72.1/24", "10.5.72.254/24", "10.5.72.1/25", "10.5.72.129/25"],
)
def test_nothing_is_said_of_a_bridge_that_serves(found: str | None) -> None:
    assert judge(IPv4Interface(found) if found else None, NETWORK, SUBNET) == ""


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ("10.5.9.1/24", "may own that subnet by now"),
        ("10.5.73.1/24", "may own that subnet by now"),
        ("10.5.9.1/8", "may own that subnet by now"),
        ("10.5.72.1/16", "its length is not the subnet's"),
        ("172.17.0.1/16", "docker was started without flannel's options"),
    ],
)
def test_a_wrong_address_is_named_with_the_remedy(found: str, reason: str) -> None:
    text = judge(IPv4Interface(found), NETWORK, SUBNET)
    assert text.startswith(f"docker0 has {found}, but this host's subnet is 10.5.72.0/24: ")
    assert reason in text
    assert "Run mk-docker-opts" in text
    assert "--bip=10.5.72.1/24" in text
    assert text.endswith("systemctl restart docker")
    assert "\n" not in text


def test_each_change_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    script: list[str | OSError | None] = [
        None,
        "172.17.0.1/16",
        "172.17.0.1/16",
        "10.5.9.1/24",
        "10.5.72.1/24",
        "10.5.72.1/24",
        OSError(errno.EPERM, "Operation not permitted"),
        OSError(errno.EPERM, "Operation not permitted"),
        "10.5.72.1/24",
        "10.5.9.1/24",
        None,
        "10.5.9.1/24",
    ]
    looks = iter(script)

    def read() -> IPv4Interface | None:
        found = next(looks)
        if isinstance(found, OSError):
            raise found
        return IPv4Interface(found) if found else None

    monkeypatch.setattr(docker0, "read_address", read)
    watch = Watch(NETWORK, SUBNET)
    with caplog.at_level(logging.INFO):
        for _ in script:
            watch.look()
    said = [(record.levelname, " ".join(record.message.split()[:3])) for record in caplog.records]
    assert said == [
        ("WARNING", "docker0 has 172.17.0.1/16,"),
        ("WARNING", "docker0 has 10.5.9.1/24,"),
        ("INFO", "docker0 has 10.5.72.1/24"),
        ("WARNING", "Cannot read the"),
        ("WARNING", "docker0 has 10.5.9.1/24,"),
        ("WARNING", "docker0 has 10.5.9.1/24,"),
    ]


def test_it_looks_until_it_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()
    looks: list[int] = []

    def read() -> None:
        looks.append(1)
        if len(looks) == 3:
            stop.set()

    monkeypatch.setattr(docker0, "read_address", read)
    Watch(NETWORK, SUBNET).run(stop, pause=0.001)
    assert len(looks) == 3
