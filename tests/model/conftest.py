import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def _one_thread():
    """Networks this small gain nothing from threads, and on a busy machine lose a hundredfold by waiting for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
