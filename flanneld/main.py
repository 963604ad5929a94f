"""The daemon from start to end: read `run` from top to bottom."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from flanneld import __version__, flags, logs
from flanneld.backend.base import Network
from flanneld.backend.registry import find_backend
from flanneld.errors import (
    ConfigError,
    FlannelError,
    LeaseLost,
    StartError,
    Stopped,
    StoreError,
    UsageError,
)
from flanneld.flags import HelpRequested, Options, Parsed
from flanneld.interface import ExternalInterface, SelectionError, look_up
from flanneld.notify import Notifier
from flanneld.retry import Outage
from flanneld.subnet import env
from flanneld.subnet.config import Config
from flanneld.subnet.local_manager import LocalManager
from flanneld.subnet.manager import SubnetManager
from flanneld.subnet.monitor import LeaseMonitor

log = logging.getLogger(__name__)

# Seconds between two looks for the network config; the original's.
CONFIG_PAUSE = 1.0

ENDING = (signal.SIGTERM, signal.SIGINT)

# Seconds the threads have to end; the store's requests are cut, so they need milliseconds.
GRACE = 1.0


class Terminated(BaseException):
    """A signal asks the daemon to end.

    Raised in the main thread wherever it is, also inside a blocked call. Not an Exception, so
    that no library can take it for one of its own failures.
    """


def console() -> NoReturn:
    """Run as a program."""
    sys.exit(main(sys.argv[1:], os.environ))


def main(argv: Sequence[str], environ: MutableMapping[str, str]) -> int:
    """Run the daemon until a signal ends it. Return the exit status."""
    try:
        parsed = flags.parse(argv, environ)
    except HelpRequested:
        sys.stderr.write(flags.usage("flanneld"))
        return 0
    except UsageError as error:
        sys.stderr.write(f"{error}\n{flags.usage('flanneld')}")
        return error.exit_code
    options = parsed.options
    if options.version:
        sys.stderr.write(f"v{__version__}\n")
        return 0
    logs.setup(options.v, options.vmodule, options.log_backtrace_at)
    return serve(parsed, Notifier(environ))


def serve(parsed: Parsed, notifier: Notifier) -> int:
    """Run the daemon with these options; log what ends it. Return the exit status."""
    stop = threading.Event()
    try:
        _install_signal_handlers(stop)
        for warning in parsed.warnings:
            log.warning("%s", warning)
        flags.check(parsed.options)
        run(parsed.options, notifier, stop)
    except (Terminated, Stopped):
        pass
    except LeaseLost as error:
        log.error("Lease has been revoked. Shutting down daemon. (%s)", error)
        return error.exit_code
    except FlannelError as error:
        log.error("%s", error)
        return error.exit_code
    except Exception:  # the last resort: a bug must end in the log, not in silence
        log.exception("flanneld stops: this is a bug, please report it with these lines")
        return 1
    return 0


def run(options: Options, notifier: Notifier, stop: threading.Event) -> None:
    """Join the network and stay in it. Raises Terminated, or what ends the daemon."""
    external = choose_interface(options)
    previous = env.read_previous(options.subnet_file)
    if previous.warning:
        log.warning("%s", previous.warning)
    with _failing_as("Failed to create SubnetManager"):
        manager = create_subnet_manager(options, previous)
    log.info("Created subnet manager: %s", manager)
    try:
        if options.healthz_port > 0:
            start_healthz(options)
        config = fetch_config(manager, notifier, stop)
        with _failing_as("Error fetching backend"):
            construct = find_backend(config.backend_type)
            backend = construct(manager, external, previous)
        with _failing_as("Error registering network"):
            notifier.status("acquiring a lease")
            network = backend.register_network(config, stop)
        write_subnet_file(options, config, network)
        keep_running(options, manager, network, notifier, stop)
    finally:
        notifier.stopping()
        stop.set()
        manager.close()
        log.info("Exiting...")


def choose_interface(options: Options) -> ExternalInterface:
    """Look up the external interface in the kernel, by the options."""
    from flanneld.kernel.link import read_host_facts

    try:
        facts = read_host_facts()
        selection = look_up(facts, options.iface, options.iface_regex, options.public_ip)
    except SelectionError as error:
        for line in error.log:
            log.info("%s", line)
        raise
    for line in selection.log:
        log.info("%s", line)
    return selection.interface


def create_subnet_manager(options: Options, previous: env.Previous) -> LocalManager:
    """Build the subnet manager for the options; nothing is sent yet."""
    from flanneld.subnet.etcd_member import Credentials
    from flanneld.subnet.etcdv2 import EtcdV2Store

    credentials = Credentials(
        options.etcd_certfile,
        options.etcd_keyfile,
        options.etcd_cafile,
        options.etcd_username,
        options.etcd_password,
    )
    store = EtcdV2Store(options.etcd_endpoints, options.etcd_prefix, credentials)
    return LocalManager(store, previous.subnet)


def start_healthz(options: Options) -> None:
    """Serve /healthz from now on, whatever the state of the store."""
    from flanneld.healthz import start_health_server

    log.info("Start healthz server on %s:%d", options.healthz_ip, options.healthz_port)
    with _signals_kept_here():
        start_health_server(options.healthz_ip, options.healthz_port)


def fetch_config(manager: SubnetManager, notifier: Notifier, stop: threading.Event) -> Config:
    """Wait for a network config that can be used, for as long as it takes."""
    missing = Outage(log.log, "Couldn't fetch network config", steady=CONFIG_PAUSE)
    notifier.status("waiting for the network config")
    while True:
        try:
            config = manager.network_config()
        except (StoreError, ConfigError) as error:
            notifier.status(f"waiting for the network config: {error}")
            if not missing.failed(error, stop):
                raise Stopped from None
        else:
            break
    log.info("Found network config - Backend type: %s", config.backend_type)
    for note in config.ignored:
        log.warning("Network config: %s", note)
    return config


def write_subnet_file(options: Options, config: Config, network: Network) -> None:
    """Tell docker and the operator which subnet this host has."""
    text = env.render(config.network, network.lease.subnet, network.mtu, options.ip_masq)
    env.write(options.subnet_file, text)
    log.info("Wrote subnet file to %s", options.subnet_file)


def keep_running(
    options: Options,
    manager: SubnetManager,
    network: Network,
    notifier: Notifier,
    stop: threading.Event,
) -> None:
    """Monitor the lease in the foreground while the backend runs in a thread."""
    subnet = network.lease.subnet
    monitor = LeaseMonitor(manager, network.lease, options.subnet_lease_renew_margin * 60.0)

    def synced() -> None:
        notifier.ready()
        notifier.status(f"leased {subnet}, following the other hosts")

    notifier.status(f"leased {subnet}, waiting for the other hosts' leases")
    with _signals_kept_here():
        threads = [
            _start("backend", lambda: network.run(stop, synced), monitor.fail),
            _start("own lease", lambda: monitor.feed(stop), monitor.fail),
        ]
    log.info("Finished starting backend.")
    try:
        monitor.run(stop)
    finally:
        log.info("Stopped monitoring lease")
        stop.set()
        network.wake()
        manager.close()
        for thread in threads:
            thread.join(GRACE / len(threads))


def _start(
    name: str, target: Callable[[], None], fail: Callable[[BaseException], None]
) -> threading.Thread:
    """Start a thread whose failure is the daemon's failure."""

    def body() -> None:
        try:
            target()
        except BaseException as error:  # noqa: BLE001 - raised again in the main thread
            fail(error)

    thread = threading.Thread(target=body, name=name, daemon=True)
    thread.start()
    return thread


@contextmanager
def _signals_kept_here() -> Iterator[None]:
    """Threads that are started within, and theirs, leave the ending signals to this thread.

    Python runs handlers in the main thread, but a signal that the kernel gives to another one
    (it may, after SIGCONT) does not wake the main thread from a blocked call.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _failing_as(what: str) -> Iterator[None]:
    """Put the original's words for the step before the error's text."""
    try:
        yield
    except Stopped:
        raise
    except FlannelError as error:
        raise StartError(f"{what}: {error}") from error


def _install_signal_handlers(stop: threading.Event) -> None:
    """SIGTERM and SIGINT end the daemon in order, a second one at once."""

    def handle(_number: int, _frame: FrameType | None) -> None:
        for other in ENDING:
            signal.signal(other, signal.SIG_DFL)
        log.info("Starting shutdown...")
        # Where an exception would be lost (in a destructor), the event still is seen.
        stop.set()
        raise Terminated

    for number in ENDING:
        signal.signal(number, handle)
    # As the original: these do not end a daemon that nobody taught to react to them.
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
