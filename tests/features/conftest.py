"""What tests of features share."""

import pytest
import torch


@pytest.fixture
def one_thread():
    """As in the processes that tests start, so that features are bitwise the same."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
