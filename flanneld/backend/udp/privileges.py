"""The tunnel's process gives up every right it does not need."""

import ctypes
import os
import signal

_NOBODY = 65534

# linux/prctl.h
_SET_PDEATHSIG, _SET_NAME, _CAPBSET_DROP, _SET_NO_NEW_PRIVS, _CAP_AMBIENT = 1, 15, 24, 38, 47
_AMBIENT_CLEAR_ALL = 4
# linux/capability.h
_CAPABILITY_VERSION_3 = 0x20080522
_LAST_CAPABILITY = 63


def end_with_parent() -> None:
    """Have the kernel end this process with the thread that started it."""
    ctypes.CDLL(None).prctl(_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def drop() -> list[str]:
    """Drop all capabilities, become nobody if root, and still end with the thread that started us.

    Returns what could not be done, one line each. What is open stays open.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    wrong: list[str] = []

    def check(result: int, what: str) -> None:
        if result != 0:
            wrong.append(f"{what}: {os.strerror(ctypes.get_errno())}")

    libc.prctl(_SET_NAME, b"flannel-udp", 0, 0, 0)
    for capability in range(_LAST_CAPABILITY + 1):
        # Unknown ones are EINVAL; without CAP_SETPCAP there is nothing to gain from the set.
        libc.prctl(_CAPBSET_DROP, capability, 0, 0, 0)
    if os.geteuid() == 0:
        try:
            os.setgroups([])
            os.setresgid(_NOBODY, _NOBODY, _NOBODY)
            os.setresuid(_NOBODY, _NOBODY, _NOBODY)
        except OSError as error:
            # In a user namespace nobody may not be mapped.
            wrong.append(f"the tunnel stays root: {error.strerror}")
    libc.prctl(_CAP_AMBIENT, _AMBIENT_CLEAR_ALL, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    nothing = (ctypes.c_uint32 * 6)()
    check(libc.capset(header, nothing), "capabilities are kept")
    check(libc.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    # Last: a change of user clears it.
    check(libc.prctl(_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "parent death signal")
    return wrong
