"""What holds for all tests."""

import os

from hypothesis import settings

# On a busy machine a step of a property may take its time: no test asserts one. What decides about
# a change (CI is set) sees the same examples each time; elsewhere each run searches on.
settings.register_profile("flannel", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("flannel")
