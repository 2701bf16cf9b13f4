"""Settings for the whole suite."""

from hypothesis import settings

# Shared machines make single examples slow now and then, which says nothing about the code;
# derandomized, so that a failure here is a failure everywhere.
settings.register_profile("suite", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("suite")
