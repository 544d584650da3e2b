"""One miniature demo for all evaluation tests; it is only read."""

from pathlib import Path

import pytest

from evaluation.huggingface_model import ExportedModel, load_exported_model
from tests.evaluation.tiny_demo import write_demo


@pytest.fixture(scope="package")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf, data and the three runs' metrics."""
    return write_demo(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="package")
def exported(demo_folder: Path) -> ExportedModel:
    """The exported model, loaded as a user would."""
    return load_exported_model(demo_folder / "hf")
