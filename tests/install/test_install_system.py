"""`make install-system` into a tree: what is where, and whether it would work there."""

import os
import re
import subprocess
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
PREFIX = "/usr/local"
HOME = f"{PREFIX}/lib/flanneld"
UNITS = ("flanneld.service", "flannel-docker.service")


def install(tree: Path, prefix: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "-C", str(TOP), "install-system", f"DESTDIR={tree}", f"PREFIX={prefix}"]
        + [f"{name}={value}" for name, value in more.items()],
        check=False,
        capture_output=True,
        text=True,
        timeout=600,
        # Of a make that runs these tests.
        env={name: value for name, value in os.environ.items() if not name.startswith("MAKE")},
    )


def ask(*argv: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command where the project's own modules are not found; its status is not looked at."""
    return subprocess.run(argv, check=False, capture_output=True, text=True, cwd="/")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("tree")
    done = install(tree, PREFIX)
    assert done.returncode == 0, done.stderr
    # What systemd-analyze needs to know of the machine, and the interpreter.
    system = tree / "usr" / "lib" / "systemd"
    system.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cp", "-rn", "/usr/lib/systemd/system", str(system)], check=True)
    return tree


def check_files(tree: Path, prefix: str, lib: str) -> None:
    """Assert that all is there; ``lib`` is where the units are."""
    for path in (
        f"{prefix}/sbin/flanneld",
        f"{prefix}/sbin/mk-docker-opts",
        f"{prefix}/libexec/flannel-docker",
    ):
        assert os.access(tree / path[1:], os.X_OK), path
    for path in (
        *(f"{lib}/systemd/system/{unit}" for unit in UNITS),
        f"{lib}/systemd/system/docker.service.d/flannel.conf",
        f"{lib}/tmpfiles.d/flannel.conf",  # noqa: S108 - a file in the tree
        "/etc/default/flanneld",
    ):
        text = (tree / path[1:]).read_text()
        assert "@PREFIX@" not in text
        assert (tree / path[1:]).stat().st_mode & 0o777 == 0o644
    unit = (tree / lib[1:] / "systemd" / "system" / "flanneld.service").read_text()
    assert f"\nExecStart={prefix}/sbin/flanneld " in unit


def test_what_is_where(tree: Path) -> None:
    check_files(tree, PREFIX, f"{PREFIX}/lib")


def test_where_systemd_does_not_look_there_are_no_units(tmp_path: Path) -> None:
    done = install(tmp_path, "/opt/flannel")
    assert done.returncode == 0, done.stderr
    check_files(tmp_path, "/opt/flannel", "/etc")


def test_nothing_knows_the_tree_it_was_built_in(tree: Path) -> None:
    found = ask("grep", "-rl", str(tree), str(tree))
    assert found.stdout == ""
    assert not list(tree.rglob(".flanneld.*"))


def test_the_programs_start(tree: Path) -> None:
    for name in ("flanneld", "mk-docker-opts"):
        first = (tree / HOME[1:] / "bin" / name).read_text().splitlines()[0]
        assert first == f"#!{HOME}/bin/python"
    python = tree / HOME[1:] / "bin" / "python"
    done = ask(python, "-m", "flanneld", "-version")
    assert (done.returncode, done.stderr[:1]) == (0, "v")
    for module in ("etcd", "pyroute2", "iptc", "sdnotify", "numpy"):
        assert ask(python, "-c", f"import {module}").returncode == 0, module


def test_it_is_compiled_for_its_place(tree: Path) -> None:
    packages = next((tree / HOME[1:] / "lib").glob("python3*/site-packages"))
    modules = list((packages / "flanneld").rglob("*.py"))
    assert modules
    for module in modules:
        compiled = list((module.parent / "__pycache__").glob(f"{module.stem}.*.pyc"))
        assert compiled, module
        assert f"{HOME}/lib/python3".encode() in compiled[0].read_bytes()


def test_systemd_finds_no_fault(tree: Path) -> None:
    done = ask("systemd-analyze", "verify", f"--root={tree}", *UNITS)
    # It ends with status 0 after a warning, too.
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_unit_is_closed_tightly(tree: Path) -> None:
    options = ("--offline=true", "--no-pager", f"--root={tree}")
    done = ask("systemd-analyze", "security", *options, UNITS[0])
    found = re.search(r"Overall exposure level for flanneld.service: ([\d.]+) (\w+)", done.stdout)
    assert found, done.stdout + done.stderr
    assert found[2] == "OK"
    assert float(found[1]) < 3


def test_a_second_installation_replaces_all_but_the_settings(tree: Path) -> None:
    settings = tree / "etc" / "default" / "flanneld"
    settings.write_text("FLANNELD_IFACE=eth7\n")
    stale = tree / PREFIX[1:] / "lib" / "flanneld" / "stale"
    stale.touch()
    done = install(tree, PREFIX)
    assert done.returncode == 0, done.stderr
    assert settings.read_text() == "FLANNELD_IFACE=eth7\n"
    assert not stale.exists()
    assert not list(tree.rglob(".flanneld.*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SYSTEM_PYTHON": "/bin/false"}, "/bin/false is not Python 3.11 or later"),
        ({"PREFIX": "usr"}, "DESTDIR and PREFIX must be absolute paths"),
        ({"PREFIX": "/opt/a b"}, "only letters, digits"),
    ],
)
def test_what_cannot_work_changes_nothing(
    tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    arguments = {"PREFIX": PREFIX, **changes}
    done = install(tmp_path, arguments.pop("PREFIX"), **arguments)
    assert done.returncode != 0
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []
