"""The report holds every section, needs nothing outside itself, and refuses a demo that is not finished."""

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from data_prep.errors import UserError
from evaluation import held_out
from evaluation.diversity import MODE_TITLES
from evaluation.report import ReportConfig, most_used_actions, read_held_out, run
from tests.evaluation.test_held_out import SUMMARY_KEYS
from tests.evaluation.tiny_demo import CHINESE_WORDS, NUM_ACTIONS, WEIGHTS, write_demo

SECTIONS = ("held-out", "training", "use", "vocabulary", "continuations", "facts")
FIGURES = 8


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> ReportConfig:
    """A demo with everything, and the settings of its report."""
    folder = write_demo(tmp_path_factory.mktemp("report"))
    held_out.run(
        held_out.HeldOutConfig(
            model=folder / "hf",
            data=folder / "data",
            output=folder / "held_out.json",
            tokens=400,
            sequence_length=20,
        )
    )
    return ReportConfig(
        demo_folder=folder,
        output=folder / "report.html",
        readme_figure=folder / "figure.png",
        prompts_per_source=1,
        prompt_tokens=6,
        new_tokens=8,
        continuations=4,
        overwrite=True,
    )


@pytest.fixture(scope="module")
def page(finished: ReportConfig) -> str:
    run(finished)
    return finished.output.read_text(encoding="utf-8")


class PageReader(HTMLParser):
    """Collects ids, addresses and image texts; fails on a tag that is closed wrongly."""

    void = frozenset({"meta", "img", "br"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids += [name for name in [values.get("id")] if name]
        self.addresses += [address for name in ("src", "href") if (address := values.get(name))]
        if tag == "img":
            self.images.append(values)
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_has_every_section_and_figure(page: str) -> None:
    reader = PageReader(page)
    assert reader.ids == list(SECTIONS)
    assert len(reader.images) == FIGURES
    assert all(image["alt"] for image in reader.images)
    for title in MODE_TITLES.values():
        assert page.count(f"<h4>{title.replace(chr(39), '&#39;')}</h4>") == len(WEIGHTS)
    assert page.count('<section class="action') == NUM_ACTIONS


def test_page_needs_nothing_outside_itself(page: str) -> None:
    for address in PageReader(page).addresses:
        assert address.startswith(("data:image/svg+xml;base64,", "#")), address
    assert not re.search(r"<script|@import|url\(", page)


def test_figures_on_the_page_are_the_measured_ones(finished: ReportConfig, page: str) -> None:
    figures = read_held_out(finished.demo_folder / "held_out.json")
    for loss in (figures.base_loss, figures.idm_loss, figures.mixture_loss, figures.random_loss):
        assert f"{loss:.3f}" in page
    for action in most_used_actions(figures, 4):
        assert f"<b>action {action}</b>" in page


def test_chinese_and_markup_in_tokens_are_shown_as_text(page: str) -> None:
    assert any(f">{word}</span>" in page for word in CHINESE_WORDS)
    assert "&lt;b&gt;" in page


def test_summary_has_the_measured_figures(finished: ReportConfig, page: str) -> None:
    summary = json.loads((finished.demo_folder / "summary.json").read_text())
    measured = json.loads((finished.demo_folder / "held_out.json").read_text())
    assert {key: summary[key] for key in SUMMARY_KEYS} == {key: measured[key] for key in SUMMARY_KEYS}
    # Steps 10, 20, 30, 40 at 1000 + step tokens a second.
    assert summary["tokens_per_second"] == {"base": 1025.0, "idm": 1025.0, "policy": 1025.0}
    assert summary["training_seconds"] == {"base": 4.0, "idm": 4.0, "policy": 4.0}
    assert list(summary["diversity"]) == list(MODE_TITLES)
    assert list(summary["per_source"]) == list(WEIGHTS)


def test_readme_figure_is_wide(finished: ReportConfig, page: str) -> None:
    assert finished.readme_figure is not None
    with Image.open(finished.readme_figure) as image:
        assert image.format == "PNG"
        width, height = image.size
    assert width == 1200
    assert 450 <= height <= 550


def test_ablation_and_step_times_appear_when_they_are_there(finished: ReportConfig, page: str) -> None:
    assert "Ablation" not in page
    assert "Seconds of each step" not in page
    folder = finished.demo_folder
    runs = [
        {"name": "published <form>", "metrics": "idm/metrics.jsonl", "figures": {"idm_loss": 1.23456}},
        {"name": "other", "metrics": str(folder / "idm/metrics.jsonl"), "figures": {"alive_actions": 17}},
    ]
    ablation = folder / "ablation_list.json"
    ablation.write_text(json.dumps({"runs": runs}))
    steps = [
        {"name": "blend", "status": "finished", "seconds": 12.34},
        {"name": "report", "status": "running", "seconds": 0.0},
    ]
    (folder / "steps.json").write_text(json.dumps({"format": 1, "steps": steps}))
    output = folder / "with_ablation.html"
    try:
        run(replace(finished, output=output, ablation=ablation))
    finally:
        (folder / "steps.json").unlink()
    text = output.read_text()
    reader = PageReader(text)
    assert "ablation" in reader.ids
    assert len(reader.images) == FIGURES + 2
    assert "published &lt;form&gt;" in text
    assert "1.235" in text
    assert ">17<" in text
    assert "12.3 s" in text


def test_every_missing_input_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "metrics.jsonl").write_text("")
    output = tmp_path / "report.html"
    with pytest.raises(UserError) as caught:
        run(ReportConfig(demo_folder=tmp_path, output=output))
    message = str(caught.value)
    assert "\n" not in message
    for name in (
        "idm/metrics.jsonl",
        "policy/metrics.jsonl",
        "hf/config.json",
        "data/blend.json",
        "held_out.json",
    ):
        assert str(tmp_path / name) in message
    assert str(tmp_path / "base" / "metrics.jsonl") not in message
    assert not output.exists()


def test_bad_inputs_leave_nothing_half_written(finished: ReportConfig, page: str, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    shutil.copytree(
        finished.demo_folder, folder, ignore=shutil.ignore_patterns("report.html", "summary.json")
    )
    config = replace(finished, demo_folder=folder, output=folder / "report.html", readme_figure=None)
    measured = json.loads((folder / "held_out.json").read_text())
    (folder / "held_out.json").write_text(json.dumps({k: v for k, v in measured.items() if k != "idm_loss"}))
    with pytest.raises(UserError, match=r"held_out.json: idm_loss: Field required"):
        run(config)
    (folder / "held_out.json").write_text(json.dumps(measured))
    with pytest.raises(UserError, match=r"ablation.json: not there"):
        run(replace(config, ablation=folder / "ablation.json"))
    (folder / "report.html").write_text("mine")
    with pytest.raises(UserError, match="--overwrite"):
        run(replace(config, overwrite=False))
    assert (folder / "report.html").read_text() == "mine"
    assert not (folder / "summary.json").exists()
