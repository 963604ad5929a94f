"""The daemon from start to end: read `run` from top to bottom."""

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

from flanneld import __version__, docker0, flags, logs, memory, signals
from flanneld.backend.base import Network
from flanneld.backend.registry import find_backend
from flanneld.errors import (
    ConfigChanged,
    ConfigError,
    FlannelError,
    InterfaceError,
    LeaseLost,
    StartError,
    Stopped,
    StoreError,
    UsageError,
)
from flanneld.flags import HelpRequested, Options, Parsed
from flanneld.heartbeat import Heartbeat
from flanneld.interface import ExternalInterface, SelectionError, look_up
from flanneld.lock import InUse, show_presence, take
from flanneld.notify import Notifier
from flanneld.retry import Outage
from flanneld.signals import Terminated, kept_in_this_thread
from flanneld.subnet import env
from flanneld.subnet.config import Config
from flanneld.subnet.lease import unusable_public_ip
from flanneld.subnet.local_manager import LocalManager
from flanneld.subnet.manager import SubnetManager
from flanneld.subnet.monitor import LeaseMonitor

if TYPE_CHECKING:
    from flanneld.masquerade.keeper import Keeper

log = logging.getLogger(__name__)

# Seconds between two looks for the network config; the original's.
CONFIG_PAUSE = 1.0

# Seconds the forward rules wait for the first peers, at most.
PEERS_FIRST = 1.0

# Seconds the threads have to end; the store's requests are cut, so they need milliseconds.
GRACE = 1.0


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
    if options.cleanup:
        from flanneld.cleanup import clean_up

        return clean_up(options)
    memory.keep_little()
    memory.look_seldom_for_garbage()
    notifier = Notifier(environ)
    try:
        signals.install(notifier.stopping)
        return serve(parsed, notifier)
    except Terminated:
        return 0


def serve(parsed: Parsed, notifier: Notifier) -> int:
    """Run the daemon with these options; log what ends it. Return the exit status."""
    try:
        for warning in parsed.warnings:
            log.warning("%s", warning)
        flags.check(parsed.options)
        env.check_place(parsed.options.subnet_file)
        run(parsed.options, notifier, threading.Event())
    except Stopped:
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
    with suppress(OSError):  # only --cleanup looks at it
        show_presence()
    external = choose_interface(options)
    previous = env.read_previous(options.subnet_file)
    if previous.warning:
        log.warning("%s", previous.warning)
    with _failing_as("Failed to create SubnetManager"):
        manager = create_subnet_manager(options, previous, notifier)
    log.info("Created subnet manager: %s", manager)
    try:
        if options.healthz_port > 0:
            start_healthz(options)
        config, network = register(manager, external, previous, notifier, stop)
        hold_lock(options)
        heart = Heartbeat()
        make = partial(make_keeper, options, config, network, previous)
        # For the masquerade rules the start waits: docker is to start with them.
        rules = start_rules(make, stop, heart) if options.ip_masq else make
        write_subnet_file(options, config, network)
        with kept_in_this_thread():
            docker0.start_watch(config.network, network.lease.subnet, stop)
        keep_running(options, manager, network, notifier, stop, heart=heart, rules=rules)
    finally:
        notifier.stopping()
        stop.set()
        manager.close()
        log.info("Exiting...")


def hold_lock(options: Options) -> None:
    """Show for as long as this process lives that the subnet file is its own."""
    with suppress(OSError):  # who cannot make it will not be able to write the subnet file either
        os.makedirs(os.path.dirname(options.subnet_file) or ".", mode=0o755, exist_ok=True)
        try:
            take(options.subnet_file)
        except InUse as error:
            log.warning(
                "Another flanneld (process %s) uses %s, too: end one of the two, or give each its"
                " own --subnet-file and --etcd-prefix",
                *(error.pid, options.subnet_file),
            )


def register(
    manager: SubnetManager,
    external: ExternalInterface,
    previous: env.Previous,
    notifier: Notifier,
    stop: threading.Event,
) -> tuple[Config, Network]:
    """Fetch the config, pick its backend, and lease a subnet; waits for what is not there yet."""
    while True:
        config = fetch_config(manager, notifier, stop)
        with _failing_as("Error fetching backend"):
            construct = find_backend(config.backend_type)
            backend = construct(manager, external, previous)
        notifier.status("acquiring a lease")
        try:
            with _failing_as("Error registering network"):
                return config, backend.register_network(config, stop)
        except ConfigChanged as change:
            log.warning("%s: beginning again", change)


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
    address = selection.interface.ext_addr
    problem = unusable_public_ip(address)
    if problem is not None:
        raise InterfaceError(
            f"the other hosts cannot reach this one at {address}, which {problem}: choose another"
            " address with --iface or --public-ip"
        )
    return selection.interface


def create_subnet_manager(
    options: Options, previous: env.Previous, notifier: Notifier
) -> LocalManager:
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
    return LocalManager(
        store, previous.subnet, lambda why: notifier.status(f"acquiring a lease: {why}")
    )


def start_healthz(options: Options) -> None:
    """Serve /healthz from now on, whatever the state of the store."""
    from flanneld.healthz import start_health_server

    log.info("Start healthz server on %s:%d", options.healthz_ip, options.healthz_port)
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


def make_keeper(
    options: Options, config: Config, network: Network, previous: env.Previous
) -> "Keeper":
    """Return what puts the masquerade and forward rules in place, and keeps them."""
    from flanneld.masquerade import keeper

    return keeper.make(
        options,
        config.network,
        network.lease.subnet,
        enable_nftables=config.enable_nftables,
        former_network=previous.network,
    )


def start_rules(
    make: Callable[[], "Keeper"], stop: threading.Event, heart: Heartbeat
) -> threading.Thread:
    """Put the rules in place now, and keep them in a thread of their own."""
    return make().start(stop, heart.pulse("masquerade"))


def keep_rules_later(
    make: Callable[[], "Keeper"],
    peers_in: threading.Event,
    stop: threading.Event,
    heart: Heartbeat,
) -> None:
    """Put rules in place that nobody waits for, after the first peers, and keep them.

    Python's threads take turns: what is imported for the rules would keep the peers waiting.
    """
    pulse = heart.pulse("masquerade")
    peers_in.wait(PEERS_FIRST)
    if not stop.is_set():
        make().run(stop, pulse)


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
    *,
    heart: Heartbeat,
    rules: "threading.Thread | Callable[[], Keeper]",
) -> None:
    """Monitor the lease in the foreground while the backend runs in a thread.

    ``rules`` are kept by a thread already, or by a keeper that begins after the first peers.
    """
    subnet, peers_in = network.lease.subnet, threading.Event()
    monitor = LeaseMonitor(manager, network.lease, options.subnet_lease_renew_margin * 60.0)

    def synced() -> None:
        notifier.ready()
        notifier.status(f"leased {subnet}, following the other hosts")
        peers_in.set()

    notifier.status(f"leased {subnet}, waiting for the other hosts' leases")
    watchdog = notifier.watchdog_interval
    loops: dict[str, Callable[[], None]] = {
        "backend": lambda: network.run(stop, synced, heart),
        "own lease": lambda: monitor.feed(stop, heart),
    }
    if watchdog is not None:
        loops["heartbeat"] = lambda: heart.run(stop, watchdog, notifier.watchdog)
    threads: list[threading.Thread] = []
    if isinstance(rules, threading.Thread):
        threads.append(rules)
    else:
        loops["masquerade"] = lambda: keep_rules_later(rules, peers_in, stop, heart)
    try:
        with kept_in_this_thread():
            threads.extend(_start(name, loop, monitor.fail) for name, loop in loops.items())
        log.info("Finished starting backend.")
        with signals.reporting(network.report):
            monitor.run(stop, heart)
    finally:
        log.info("Stopped monitoring lease")
        stop.set()
        peers_in.set()
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
def _failing_as(what: str) -> Iterator[None]:
    """Put the original's words for the step before the error's text."""
    try:
        yield
    except (Stopped, ConfigChanged):
        raise
    except FlannelError as error:
        raise StartError(f"{what}: {error}") from error
