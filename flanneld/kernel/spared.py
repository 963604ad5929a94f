"""What a former run left, and is not swept at once.

The first set of peers comes from a store that may have lost its data (emptied, or restored from a
backup), and that cannot be seen from one look at it: the peers that it lacks may be alive, and
publish their leases again within seconds. So their entries are spared for a while, unless a wanted
entry takes their slot.
"""

import logging
from collections.abc import Callable, Sequence

from flanneld.clock import now
from flanneld.kernel.state import Found

log = logging.getLogger(__name__)

# Seconds. A peer looks after its lease again within the 3 s of a pause; a member of the store that
# is dead or mute may cost it 2 + 5 s more.
SPARE = 15.0


class Spared:
    """The entries that are spared, from the first comparison on and for `SPARE` seconds."""

    def __init__(self) -> None:
        self._choose: Callable[[Found], bool] | None = None
        self._entries: frozenset[Found] = frozenset()
        self._until = 0.0

    def begin(self, choose: Callable[[Found], bool] | None) -> None:
        """Have the next comparison spare what ``choose`` says; None: nothing more."""
        self._choose = choose

    def settle(self, left: Callable[[], Sequence[Found]]) -> None:
        """Settle, at the first comparison, what is spared; later, whether its time is over.

        ``left`` gives what is ours and nobody wants.
        """
        if self._choose is not None:
            choose, self._choose = self._choose, None
            self._entries = frozenset(item for item in left() if choose(item))
            self._until = now() + SPARE
            if self._entries:
                log.info(
                    "Keeping %d kernel entries of a former run for %.0f s: the store does not know"
                    " their hosts, which may be about to publish their leases again",
                    *(len(self._entries), SPARE),
                )
        if now() >= self._until:
            self._entries = frozenset()

    def __contains__(self, found: Found) -> bool:
        return found in self._entries

    @property
    def until(self) -> float | None:
        """When the time is over; None if nothing is spared."""
        return self._until if self._entries else None
