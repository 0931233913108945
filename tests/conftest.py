"""Shared by all tests: one thread (the suite shares two cores), and no network but loopback."""
import ipaddress
import socket

import pytest
import torch

torch.set_num_threads(1)

_connect = socket.socket.connect


def _loopback_only(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6):
        host = address[0]
        if host != "localhost" and not ipaddress.ip_address(host).is_loopback:
            raise PermissionError(f"a test tried to reach {host}: tests and notebooks run without a network")
    return _connect(self, address)


@pytest.fixture(autouse=True, scope="session")
def no_network():
    "Any connection that leaves the machine fails the test that makes it."
    socket.socket.connect = _loopback_only
    yield
    socket.socket.connect = _connect


def pytest_collection_modifyitems(items):
    """Notebooks late: one that defines an operator registers it anew in this process, and calling the first one then crashes.
    Browsers last: Playwright leaves a running event loop in this thread, which views would hand their work to."""
    items.sort(key=lambda item: 2 * (item.path.parent.name == "browser") + (item.path.name == "test_notebooks.py"))
