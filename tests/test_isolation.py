"""The guards of tests/conftest.py guard."""

import os
import socket
import threading

import pytest
import torch

# A documentation address (RFC 5737): nobody is there, and a failing guard would only time out.
ELSEWHERE = ("192.0.2.1", 80)


@pytest.mark.parametrize("method", ["connect", "connect_ex"])
def test_other_machines_are_out_of_reach(method: str) -> None:
    with socket.socket() as client:
        client.settimeout(0.2)
        with pytest.raises(Exception, match=r"a test reached for 192\.0\.2\.1"):
            getattr(client, method)(ELSEWHERE)


def test_names_of_other_machines_are_not_looked_up() -> None:
    with pytest.raises(Exception, match=r"a test reached for huggingface\.co"):
        socket.create_connection(("huggingface.co", 443), timeout=0.2)


def test_loopback_works() -> None:
    with socket.create_server(("localhost", 0)) as server:
        accepting = threading.Thread(target=lambda: server.accept()[0].close())
        accepting.start()
        socket.create_connection(server.getsockname(), timeout=5).close()
        accepting.join(timeout=5)
    assert not accepting.is_alive()


def test_one_thread_a_process() -> None:
    assert torch.get_num_threads() == 1
    assert os.environ["OMP_NUM_THREADS"] == "1"
