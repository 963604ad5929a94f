"""The subnet file: its bytes, its durability, and what is made of whatever stands in it."""

import contextlib
import errno
import os
import re
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from ipaddress import IPv4Network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanneld.errors import SubnetFileError
from flanneld.subnet.env import Previous, read_previous, render, write

FIXTURE = Path(__file__).parent.parent / "fixtures" / "edge" / "subnet-env-variants.txt"
OLD = "FLANNEL_SUBNET=10.5.1.1/24\n"
NEW = render(IPv4Network("10.5.0.0/16"), IPv4Network("10.5.17.0/24"), 1472, False)


def test_render_is_the_recorded_file() -> None:
    assert NEW == (
        "FLANNEL_NETWORK=10.5.0.0/16\n"
        "FLANNEL_SUBNET=10.5.17.1/24\n"
        "FLANNEL_MTU=1472\n"
        "FLANNEL_IPMASQ=false\n"
    )
    masqueraded = render(IPv4Network("10.5.0.0/16"), IPv4Network("10.5.17.0/24"), 1450, True)
    assert masqueraded.splitlines()[2:] == ["FLANNEL_MTU=1450", "FLANNEL_IPMASQ=true"]


# Writing


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize(
    ("mask", "directory_mode", "file_mode"),
    [(0o022, 0o755, 0o644), (0o077, 0o700, 0o600), (0o000, 0o755, 0o666)],
)
def test_modes_are_the_recorded_ones(
    tmp_path: Path, mask: int, directory_mode: int, file_mode: int
) -> None:
    target = tmp_path / "x" / "y" / "z.env"
    with umask(mask):
        write(target, NEW)
    assert target.read_text() == NEW
    assert names(target.parent) == ["z.env"]
    for path, mode in ((target.parent.parent, directory_mode), (target.parent, directory_mode),
                       (target, file_mode)):  # fmt: skip
        assert stat.S_IMODE(path.stat().st_mode) == mode


def test_an_old_file_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "subnet.env"
    target.write_text(OLD * 100)
    target.chmod(0o400)
    with umask(0o022):
        write(str(target), NEW)
    assert target.read_text() == NEW
    assert stat.S_IMODE(target.stat().st_mode) == 0o644
    assert names(tmp_path) == ["subnet.env"]


def test_a_name_without_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write("subnet.env", NEW)
    assert (tmp_path / "subnet.env").read_text() == NEW


def test_a_symbolic_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("precious")
    target = tmp_path / "subnet.env"
    target.symlink_to(elsewhere)
    write(target, NEW)
    assert not target.is_symlink()
    assert elsewhere.read_text() == "precious"


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:7]))
    write(tmp_path / "subnet.env", NEW)
    assert (tmp_path / "subnet.env").read_text() == NEW


@pytest.mark.parametrize("call", ["mkdir", "open", "write", "fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    target = tmp_path / "subnet.env"
    if call == "mkdir":
        target = tmp_path / "sub" / "subnet.env"
    else:
        target.write_text(OLD)
    before = names(tmp_path)

    def fail(*_args: object, **_kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(SubnetFileError) as caught:
            write(target, NEW)
    assert str(caught.value) == (
        f"Failed to write subnet file {target}: No space left on device; "
        "make its directory writable, or name another file with --subnet-file"
    )
    assert names(tmp_path) == before
    if call != "mkdir":
        assert target.read_text() == OLD


def test_a_directory_that_cannot_be_made_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync
    number = errno.EIO

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(SubnetFileError, match="Input/output error"):
        write(tmp_path / "subnet.env", NEW)
    number = errno.EINVAL  # some file systems have no such thing
    write(tmp_path / "subnet.env", NEW)


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "directory").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    for place, reason in (
        ("file/subnet.env", "Not a directory"),
        ("directory", "Is a directory"),
        ("loop/subnet.env", "Too many levels"),
        ("a/" * 3000 + "subnet.env", "File name too long"),
        ("x" * 300, "File name too long"),
        ("nul\0/subnet.env", "embedded null"),  # byte or character, as Python words it
    ):
        with pytest.raises(SubnetFileError, match=reason):
            write(tmp_path / place, NEW)
    for path in ("", ".", "/"):
        with pytest.raises(SubnetFileError, match="names no file"):
            write(path, NEW)
    assert names(tmp_path) == ["directory", "file", "loop"]
    assert names(tmp_path / "directory") == []


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
    for name, is_still in (("fifo", stat.S_ISFIFO), ("socket", stat.S_ISSOCK)):
        with pytest.raises(SubnetFileError, match="not a regular file"):
            write(tmp_path / name, NEW)
        assert is_still(os.lstat(tmp_path / name).st_mode)
    assert names(tmp_path) == ["fifo", "socket"]


DIED, FINISHED, RAISED = range(3)
DIES_AT = [(call, after) for call in ("mkdir", "open", "write", "fsync", "close", "replace")
           for after in (False, True)]  # fmt: skip


@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize(("call", "after"), DIES_AT)
@pytest.mark.parametrize("existing", [True, False])
def test_a_crash_leaves_the_old_or_the_new_file(
    tmp_path: Path, call: str, after: bool, nth: int, existing: bool
) -> None:
    """The process ends before or after the nth such call, as by ``kill -9``."""
    target = tmp_path / "run" / "subnet.env"
    if existing:
        target.parent.mkdir()
        target.write_text(OLD)
    child = os.fork()
    if child == 0:
        try:
            die_at(call, after, nth)
            write(target, NEW)
            os._exit(FINISHED)
        finally:  # never back into the test run
            os._exit(RAISED)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in {DIED, FINISHED}
    found = target.read_text() if target.exists() else None
    assert found in {OLD if existing else None, NEW}
    if code == FINISHED or (call, after, nth) == ("replace", True, 1):
        assert found == NEW
    # Whatever was left behind does not trouble the next start.
    write(target, NEW)
    assert target.read_text() == NEW


def die_at(call: str, after: bool, nth: int) -> None:
    real: Callable[..., object] = getattr(os, call)
    calls = 0

    def dying(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == nth and not after:
            os._exit(DIED)
        result = real(*args, **kwargs)
        if calls == nth:
            os._exit(DIED)
        return result

    setattr(os, call, dying)


def test_the_file_is_durable_before_it_is_renamed_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        where = Path(f"/proc/self/fd/{descriptor}").readlink()
        steps.append("directory" if where == tmp_path else f"{where.read_text() == NEW}")
        real_fsync(descriptor)

    def replace(source: Path, target: Path) -> None:
        assert source.parent == target.parent
        steps.append("renamed")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write(tmp_path / "subnet.env", NEW)
    assert steps == ["True", "renamed", "directory"]


def test_daemons_that_write_at_the_same_time(tmp_path: Path) -> None:
    target = tmp_path / "subnet.env"
    texts = [f"{'x' * 5000}{number}\n" for number in range(4)]
    failures: list[BaseException] = []

    def daemon(text: str) -> None:
        try:
            for _ in range(20):
                write(target, text)
                assert target.read_text() in texts
        except BaseException as error:  # noqa: BLE001 - reported by the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=daemon, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert names(tmp_path) == ["subnet.env"]


# Reading


def recorded_variants() -> list[tuple[str, str | None, str | None]]:
    """Text of the file, the previous subnet, and the warning: the first three lines of each
    case that shows the file's text.
    """
    cases = []
    for case in FIXTURE.read_text().split("##### subnet.env = ")[1:]:
        text, _, log = case.partition("\n")
        subnet = re.search(r"Previous Subnet: (\S+)", log)
        warning = re.search(r"^E.*\] (.* at )/run/flannel/subnet.env(: .*)$", log, re.MULTILINE)
        cases.append(
            (
                text.replace("\\n", "\n"),
                subnet[1] if subnet and subnet[1] != "0.0.0.0/0" else None,
                f"{warning[1]}PATH{warning[2]}" if warning else None,
            )
        )
    return cases


VARIANTS = recorded_variants()


def test_all_variants_were_found() -> None:
    assert len(VARIANTS) == 10
    assert [subnet for _, subnet, _ in VARIANTS].count("10.5.9.0/24") == 5
    assert sum(warning is not None for _, _, warning in VARIANTS) == 3


@pytest.mark.parametrize(("text", "subnet", "warning"), VARIANTS, ids=[v[0] for v in VARIANTS])
def test_recorded_variant(
    tmp_path: Path, text: str, subnet: str | None, warning: str | None
) -> None:
    path = tmp_path / "subnet.env"
    path.write_text(text + "\n")
    found = read_previous(path)
    assert found.subnet == (IPv4Network(subnet) if subnet else None)
    if "fd00" in text:
        warning = "Couldn't parse previous subnet from subnet file at PATH: invalid CIDR address: "
    if warning is None:
        assert found.warning is None
    else:
        assert found.warning is not None
        assert found.warning.startswith(warning.replace("PATH", str(path)))


SUBNET = IPv4Network("10.5.9.0/24")
NETWORK = IPv4Network("10.5.0.0/16")


@pytest.mark.parametrize(
    ("text", "previous"),
    [
        ("", Previous()),
        ("\n \n#\n\t# FLANNEL_SUBNET=10.5.9.1/24\n", Previous()),
        ("DOCKER_OPTS=--bip=10.5.9.1/24", Previous()),
        ("FLANNEL_SUBNET=10.5.9.1/24", Previous(SUBNET)),
        ("FLANNEL_SUBNET=10.5.9.1/24\r\nFLANNEL_NETWORK=10.5.0.0/16\r\n",
         Previous(SUBNET, NETWORK)),
        ("\ufeffFLANNEL_SUBNET=10.5.9.1/24", Previous(SUBNET)),
        ("FLANNEL_SUBNET=10.5.8.1/24\nFLANNEL_SUBNET=10.5.9.1/24", Previous(SUBNET)),
        (" FLANNEL_SUBNET = 10.5.9.1/24 ", Previous(SUBNET)),
        ("export  FLANNEL_SUBNET='10.5.9.1/24'#x", Previous(SUBNET)),
        ('FLANNEL_SUBNET: "10.5.9.1/24" # "', Previous(SUBNET)),
        ("X='a # b'\nY=\"c'#d\" # it's\nFLANNEL_SUBNET=10.5.9.1/24", Previous(SUBNET)),
        ("X=it's # one\nFLANNEL_SUBNET=10.5.9.1/24", Previous(SUBNET)),
        ("exportFLANNEL_SUBNET=10.5.9.1/24", Previous()),
        ("flannel_subnet=10.5.9.1/24", Previous()),
        ("FLANNEL_SUBNET=0.0.0.0/0", Previous()),
        ("FLANNEL_IPV6_SUBNET=fd00::1/64\nFLANNEL_NETWORK=10.5.0.0/16", Previous(None, NETWORK)),
    ],
)  # fmt: skip
def test_texts_that_are_read(tmp_path: Path, text: str, previous: Previous) -> None:
    path = tmp_path / "subnet.env"
    path.write_text(text, newline="")
    assert read_previous(str(path)) == previous


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"garbage", "Can't separate key from value in line 1: garbage"),
        (b"FLANNEL_SUBNET=10.5.9.1/24\ngarbage", "Can't separate key from value in line 2"),
        (b"\x7fELF\x00\xff", "Can't separate key from value in line 1: \\x7fELF\\x00\\ufffd"),
        (b"X=1\n" * 100_000, "larger than 65536 bytes"),
    ],
)
def test_a_file_that_is_refused_whole(tmp_path: Path, text: bytes, reason: str) -> None:
    path = tmp_path / "subnet.env"
    path.write_bytes(text)
    found = read_previous(path)
    assert (found.subnet, found.network) == (None, None)
    assert found.warning is not None
    assert found.warning.startswith(
        f"Couldn't fetch previous subnet from subnet file at {path}: {reason}"
    )


@pytest.mark.parametrize(
    "value",
    ["", "garbage", "10.5.9.1", "10.5.9.1/33", "10.5.9.01/24", "fd00::1/64",
     "10.5.9.1/255.255.255.0", "1.2.3.4/24 x"],
)  # fmt: skip
def test_values_that_are_refused(tmp_path: Path, value: str) -> None:
    path = tmp_path / "subnet.env"
    path.write_text(f"FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET={value}\n")
    problem = f"from subnet file at {path}: invalid CIDR address: {value}"
    assert read_previous(path) == Previous(
        None, NETWORK, f"Couldn't parse previous subnet {problem}"
    )
    path.write_text(f"FLANNEL_NETWORK={value}\nFLANNEL_SUBNET=10.5.9.1/24\n")
    assert read_previous(path) == Previous(
        SUBNET, None, f"Couldn't parse previous network {problem}"
    )
    path.write_text(f"FLANNEL_NETWORK={value}\nFLANNEL_SUBNET={value}\n")
    warning = read_previous(path).warning
    assert warning == (
        f"Couldn't parse previous subnet {problem}; Couldn't parse previous network {problem}"
    )


def test_missing_file_is_silent(tmp_path: Path) -> None:
    assert read_previous(tmp_path / "subnet.env") == Previous()
    assert read_previous(tmp_path / "no" / "subnet.env") == Previous()


def test_places_that_cannot_be_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("")
    for place, reason in (
        (tmp_path, "not a regular file"),
        (tmp_path / "fifo", "not a regular file"),
        (Path("/dev/zero"), "not a regular file"),
        (tmp_path / "loop", "Too many levels of symbolic links"),
        (tmp_path / "file" / "subnet.env", "Not a directory"),
        (tmp_path / "nul\0", "embedded null"),
    ):
        warning = f"Couldn't fetch previous subnet from subnet file at {place}: "
        found = read_previous(place)
        assert found == Previous(warning=found.warning)
        assert (found.warning or "").startswith(warning)
        assert reason in (found.warning or "")


@given(st.integers(0, 2**32 - 1), st.integers(1, 29), st.data())
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, address: int, prefix: int, data: st.DataObject
) -> None:
    network = IPv4Network((address, prefix), strict=False)
    length = data.draw(st.integers(prefix + 1, 30))
    subnet = IPv4Network((address, length), strict=False)
    mtu = data.draw(st.integers(576, 65535))
    ip_masq = data.draw(st.booleans())
    path = tmp_path_factory.getbasetemp() / "round-trip.env"
    write(path, render(network, subnet, mtu, ip_masq))
    assert read_previous(path) == Previous(subnet, network)


@given(
    st.binary(max_size=200)
    | st.lists(
        st.sampled_from([b"FLANNEL_SUBNET", b"FLANNEL_NETWORK", b"=", b":", b"export ", b"#", b'"',
                         b"'", b"\n", b" ", b"10.5.9.1/24", b"10.5.0.0/16", b"fd00::/64", b"\xff"])
    ).map(b"".join)
)  # fmt: skip
def test_any_bytes_are_read_or_warned_about(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.env"
    path.write_bytes(content)
    found = read_previous(path)
    assert found.warning is None or found.warning.startswith("Couldn't ")
    for network in (found.subnet, found.network):
        assert network is None or network.prefixlen > 0
