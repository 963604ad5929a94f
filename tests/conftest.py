"""What holds for all tests."""

from hypothesis import settings

# On a busy machine a step of a property may take its time: no test asserts one.
settings.register_profile("flannel", deadline=None)
settings.load_profile("flannel")
