"""Secrets in the environment that are none, to see that no command writes them anywhere."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

NAMES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
SECRETS = {name: f"canary-{number}-of-a-secret" for number, name in enumerate(NAMES)}


@contextmanager
def pretend_secrets() -> Iterator[None]:
    """They are in the environment until the block ends."""
    with pytest.MonkeyPatch.context() as patch:
        for name, secret in SECRETS.items():
            patch.setenv(name, secret)
        yield


def files_with_secrets(folder: Path) -> list[Path]:
    """Files and folders under `folder` that hold one of SECRETS, or have it in their name."""
    secrets = [secret.encode() for secret in SECRETS.values()]
    return [
        path
        for path in sorted(folder.rglob("*"))
        if any(s in os.fsencode(path) or (path.is_file() and s in path.read_bytes()) for s in secrets)
    ]
