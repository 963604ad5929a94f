"""pyroute2's IPRoute, imported without the rest of pyroute2.

The package's own `__init__` imports a database of the network, several kinds of sockets and
plugins that nobody uses here. Without them the first change to a device comes a tenth of a second
earlier, and the daemon is 6 MB smaller.
"""

import sys
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any

_NAME = "pyroute2"


def _import() -> tuple[Any, Any]:
    spec = PathFinder.find_spec(_NAME)
    if _NAME in sys.modules or spec is None or spec.submodule_search_locations is None:
        return _import_what_is_there()
    # A package that has its parts, and has not run its __init__.
    bare = ModuleType(_NAME)
    bare.__path__ = [*spec.submodule_search_locations]
    sys.modules[_NAME] = bare
    try:
        return _import_what_is_there()
    finally:
        # Who else needs pyroute2 gets the whole one.
        del sys.modules[_NAME]


def _import_what_is_there() -> tuple[Any, Any]:
    from pyroute2.iproute import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    return IPRoute, NetlinkError


IPRoute, NetlinkError = _import()
