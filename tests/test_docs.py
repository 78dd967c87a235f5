"""The documents: links and names in them exist, and the README is short."""

import re
import textwrap
from pathlib import Path

import pytest
from tiny import tiny_config

import vimd_jax
from vimd_jax.config import STAGES, Stage
from vimd_jax.train import train
from vimd_jax.training.metrics import read_metrics

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


def anchors(page: Path) -> set[str]:
    """The anchors `#...` of a page, as GitHub derives them from headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for link in links:
        path, _, anchor = link.partition("#")
        if not link.startswith("http"):
            target = page.parent / path if path else page
            assert target.is_file(), link
            assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_modules_that_are_named_exist(page):
    text = page.read_text()
    folders = "configs|docs|examples|kernels|scripts|tests|vimd_jax|weight_convert"
    for name in re.findall(rf"(?<![\w/.~])(?:{folders})/[\w/]+\.\w+", text):
        assert (ROOT / name).is_file() or name == "configs/local_vim_found.py", name
    for name in re.findall(r"python -m ((?:vimd_jax|weight_convert|kernels)[\w.]*)", text):
        assert (ROOT / name.replace(".", "/")).with_suffix(".py").is_file(), name


def test_messages_that_are_quoted_are_those_of_the_code():
    files = [path for package in ("kernels", "vimd_jax", "weight_convert") for path in (ROOT / package).rglob("*.py")]
    code = re.sub(r'"\n\s*f?"', "", "".join(path.read_text() for path in files))  # a message may be cut into lines
    quoted = re.findall(r'^\* \*"(.*?)"\*', (ROOT / "docs" / "troubleshooting.md").read_text(), flags=re.MULTILINE)
    assert quoted
    for message in quoted:
        for part in re.split(r"…|'\w+'", message):
            assert part.strip(" :,;") in code, message


def test_the_readme_is_short():
    assert (ROOT / "README.md").stat().st_size <= 10_000


def test_the_citation_is_of_this_version():
    assert f"\nversion: {vimd_jax.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_task_of_contributing_trains(tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.DOTALL)[1]
    names = {}
    exec(textwrap.dedent("   " + code.lstrip()), names)
    monkeypatch.setitem(STAGES, "colour", Stage(names["MEAN_COLOUR"], trained="colour"))
    train(tiny_config("colour"), tmp_path)
    assert read_metrics(tmp_path)[-1]["metrics"]["psnr"] > 0
