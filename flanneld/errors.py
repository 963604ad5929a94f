"""Every error this daemon raises on purpose, and the exit status each becomes.

An error's text is one sentence for the operator: which thing, which value, and what to do.
``main`` logs it and exits with ``exit_code``; an error that is retried never gets there.
"""


class FlannelError(Exception):
    """Base of all: something the daemon cannot go on with."""

    exit_code = 1


class Stopped(FlannelError):
    """The daemon was asked to end; what was under way is given up."""

    exit_code = 0


class UsageError(FlannelError):
    """The command line cannot be understood. The text is Go's, without the usage."""

    exit_code = 2


class OptionError(FlannelError):
    """An option was understood, but its value cannot be used."""


class StartError(FlannelError):
    """A step of the start-up failed; the text names the step and the reason."""


class InterfaceError(FlannelError):
    """No usable external interface."""


class ConfigError(FlannelError):
    """The network config in the store is missing or invalid. Retried: it may be mended there."""


class ConfigChanged(FlannelError):
    """The network config is another by now: the start-up begins again with it."""


class BackendError(FlannelError):
    """The backend is unknown, its keys are wrong, or it cannot work on this host."""


class DeviceError(BackendError):
    """The backend's device cannot be made or mended."""


class SubnetFileError(FlannelError):
    """``subnet.env`` cannot be written, or its text is not what flanneld writes."""


class LeaseLost(FlannelError):
    """Another host holds this host's subnet. Only a restart, into another subnet, helps."""


class OutOfSubnets(FlannelError):
    """Every subnet of the network is taken. Retried: a lease may expire.

    ``warnings`` are lines to log: why this host cannot have the subnets it had before.
    """

    def __init__(self, message: str, warnings: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.warnings = warnings


class StoreError(FlannelError):
    """The store refused or failed a request. Retried unless a subclass says more."""


class StoreUnavailable(StoreError):
    """No member of the store gave an answer; the request may or may not have been carried out."""


class StoreSilent(StoreUnavailable):
    """As its base; a member that was connected to did not answer in time, or says so itself."""


class StoreDenied(StoreError):
    """The store wants other credentials."""


class KeyNotFound(StoreError):
    """The key is not there. ``index`` is the store's index when it said so."""

    def __init__(self, message: str, index: int) -> None:
        super().__init__(message)
        self.index = index


class CompareFailed(StoreError):
    """A compare-and-swap lost: the key was not in the state the write was made for."""


class HistoryCleared(StoreError):
    """The store no longer has the events after the index asked for: take a snapshot."""
