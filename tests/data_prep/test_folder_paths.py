"""Paths from lists and manifests stay in their folder, also where a whole list with a right seal says otherwise."""

import json
from pathlib import Path

import pytest

from data_prep.blended_data import BLEND_FILE, open_blend
from data_prep.errors import UserError
from data_prep.folder_paths import inside_folder
from data_prep.output_files import CHECKSUM_FIELD, write_sealed_json
from data_prep.unit_manifest import UNITS_FILE, read_source_units
from data_prep.verify_shards import verify
from tests.data_prep.small_shards import write_blend, write_source

ESCAPES = ("../x", "train/../../x", "/etc/x", "//x", "..", "", "train/\0x")


@pytest.mark.parametrize("path", ESCAPES)
def test_paths_that_lead_out_are_refused(path: str) -> None:
    with pytest.raises(ValueError, match="is no path inside the folder"):
        inside_folder(path)


@pytest.mark.parametrize("path", ["x", "train/shard_00000", "train/..x", "a..b/c.d", "./x"])
def test_paths_inside_are_kept(path: str) -> None:
    assert inside_folder(path) == path


@pytest.mark.parametrize("path", ESCAPES)
def test_a_blend_cannot_name_files_elsewhere(tmp_path: Path, path: str) -> None:
    blend = write_blend(tmp_path / "blend")
    content = json.loads((blend / BLEND_FILE).read_text())
    del content[CHECKSUM_FIELD]
    train, validation, tokenizer = content["train"], content["validation"], content["tokenizer"]
    for change, place in (
        ({"train": {"shards": [train["shards"][0] | {"prefix": path}]}}, r"train\.shards\.0\.prefix"),
        ({"validation": {"wudao": validation["wudao"] | {"prefix": path}}}, r"validation\.wudao\.prefix"),
        ({"tokenizer": tokenizer | {"files": {path: "0"}}}, r"tokenizer\.files\..*"),
    ):
        write_sealed_json(blend / BLEND_FILE, content | change)
        with pytest.raises(UserError, match=rf"blend\.json: {place}: .*is no path inside the folder"):
            open_blend(blend)
        assert any("is no path inside the folder" in problem for problem in verify(blend).problems)


def test_a_source_cannot_name_units_elsewhere(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", "wudao")
    content = json.loads((source / UNITS_FILE).read_text())
    del content[CHECKSUM_FIELD]
    for split in ("train", "validation"):
        write_sealed_json(source / UNITS_FILE, content | {split: ["part.0", "../../x"]})
        with pytest.raises(UserError, match=rf"units\.json: {split}\.1: .*is no path inside the folder"):
            read_source_units(source)
