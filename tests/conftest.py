"""What holds for every test (no network, one thread, no GPU test without a GPU), and what many share."""

import ipaddress
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ENVIRONMENT = {
    # The tests start several processes on the same few cores.
    "OMP_NUM_THREADS": "1",
    # Subprocesses are out of reach of the socket guard below; these keep them off the network.
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
}


SLURM = "tests/slurm/"  # where the tests share one cluster


class NetworkUseError(Exception):
    """A test reached for the network; not an OSError, which libraries take for a passing failure."""


def pytest_configure(config: pytest.Config) -> None:
    """Before anything imports torch, which reads the number of threads once."""
    os.environ.update(ENVIRONMENT)
    # Ignored where pytest was started in the background, and then also by the programs that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give a worker whole files, so that what their tests share is made once; and one of them all of Slurm's."""
    from xdist.scheduler import LoadFileScheduling

    class FilesTogether(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.split("::")[0]
            return SLURM if path.startswith(SLURM) else path

    return FilesTogether(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slurm's tests first, since they take longest; skip tests marked `gpu` where there is no GPU."""
    items.sort(key=lambda item: not item.nodeid.startswith(SLURM))
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch sees none here"))


@pytest.fixture(scope="session")
def tiny_blend(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A blend of small sample corpora, made by the real steps: vocabulary 1024, four sources."""
    from data_prep.blend import BlendConfig, blend
    from data_prep.sample_corpus import SampleCorpusConfig, make_corpora
    from data_prep.tokenize_corpus import TokenizeConfig, tokenize_corpus
    from data_prep.train_tokenizer import TrainTokenizerConfig, train_tokenizer

    folder = tmp_path_factory.mktemp("tiny_blend")
    corpora, tokenizer, tokenized = folder / "corpora", folder / "tokenizer", folder / "tokenized"
    make_corpora(SampleCorpusConfig(output=corpora, size_mb=1.5))
    train_tokenizer(TrainTokenizerConfig(corpora=corpora, output=tokenizer, vocab_size=1024))
    for source in ("slimpajama", "starcoder", "proof_pile_2", "wudao"):
        tokenize_corpus(
            TokenizeConfig(
                source=source,
                input=str(corpora / source),
                tokenizer=tokenizer,
                output=tokenized / source,
                validation_fraction=0.2,
            )
        )
    output = folder / "blend"
    blend(
        BlendConfig(
            tokenized=tokenized,
            tokenizer=tokenizer,
            output=output,
            total_tokens=100_000,
            shard_tokens=50_000,
            validation_tokens=4_000,
        )
    )
    return output


@pytest.fixture(autouse=True)
def _loopback_only() -> Iterator[None]:
    """Sockets reach this machine and nothing else."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, _guarded(getattr(socket.socket, name)))
        patch.setattr(socket, "getaddrinfo", _guarded_lookup)
        yield


def _guarded(plain: Callable[..., object]) -> Callable[[socket.socket, Any], object]:
    def guard(self: socket.socket, address: Any) -> object:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            _require_loopback(address[0])
        return plain(self, address)

    return guard


_plain_lookup = socket.getaddrinfo


def _guarded_lookup(host: str | bytes | None, *args: Any, **kwargs: Any) -> object:
    if host is not None:
        _require_loopback(host.decode() if isinstance(host, bytes) else host)
    return _plain_lookup(host, *args, **kwargs)


def _require_loopback(host: str) -> None:
    if host in ("", "localhost", socket.gethostname()):
        return
    try:
        allowed = ipaddress.ip_address(host).is_loopback or ipaddress.ip_address(host).is_unspecified
    except ValueError:  # some other machine's name
        allowed = False
    if not allowed:
        raise NetworkUseError(f"a test reached for {host}; tests use nothing beyond this machine")
