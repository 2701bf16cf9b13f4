"""Settings for the whole suite."""

import torch
from hypothesis import settings

# The tensors are small; and where something else uses the cores, threads that wait for each
# other make a suite of minutes take hours.
torch.set_num_threads(1)

# Shared machines make single examples slow now and then, which says nothing about the code;
# derandomized, so that a failure here is a failure everywhere.
settings.register_profile("suite", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("suite")
