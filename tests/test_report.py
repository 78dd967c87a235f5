"""The page of finished runs: valid, self-contained, escaped; its differences against a computation by hand."""

import re
import shutil
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_config

from vimd_jax import page, report, train
from vimd_jax.evaluate import Measurement
from vimd_jax.tasks.classification import CLASSIFICATION, scores
from vimd_jax.tasks.task import Sums

HOSTILE = ("<script>alert(1)<b>", '"><img src=x onerror=alert(2)>', "plain & simple")
VOID = {"meta", "img", "br", "wbr", "line", "circle", "polyline"}


class Checked(HTMLParser):
    """Reads a page; fails on elements that are not closed in order and on a second use of an id."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.elements, self.ids, self.words = [], [], set(), []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        assert attributes.get("id") is None or attributes["id"] not in self.ids
        self.ids.add(attributes.get("id"))
        self.elements.append((tag, attributes))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def check(text: str) -> Checked:
    """A page that needs nothing from elsewhere and runs no script but its own."""
    assert text.startswith("<!DOCTYPE html>") and len(text.encode()) < 10e6
    checked = Checked(text)
    tags = [tag for tag, _ in checked.elements]
    assert {"html", "head", "title", "body"} <= set(tags) and not {"link", "iframe", "b"} & set(tags)
    for tag, attributes in checked.elements:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        source, target = attributes.get("src", "data:"), attributes.get("href", "#")
        assert source.startswith("data:") and target[0] == "#" and (target == "#" or target[1:] in checked.ids)
    scripts = [attributes for tag, attributes in checked.elements if tag == "script"]
    assert sum("type" not in attributes for attributes in scripts) == 1
    assert "http:" not in text and "https:" not in text and "url(" not in text
    assert "default-src 'none'" in text
    return checked


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run on image files whose classes have hostile names."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for name in HOSTILE:
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"<i>{i}.png")
    config = tiny_config("classifier", dataset__name="folder", dataset__directory=str(folder))
    workdir = tmp_path_factory.mktemp("runs") / "<u>run"
    train.train(config, workdir)
    return workdir


def test_a_run_leaves_a_page_whatever_its_names_are(finished):
    checked = check((finished / "report.html").read_text())
    words = " ".join(checked.words)
    for name in (*HOSTILE, "<u>run"):
        assert name in words
    assert re.search(r"[\d.]+ to [\d.]+ \(Wilson\)", words) and "(bootstrap)" in words
    assert any(tag == "canvas" for tag, _ in checked.elements)


def test_two_runs_stand_beside_each_other(finished, tmp_path, monkeypatch, capfd):
    shutil.copytree(finished, tmp_path / "again")
    arguments = ["report", str(finished), str(tmp_path / "again"), f"--output={tmp_path / 'out' / 'both.html'}"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(report, "show_log", lambda: None)
    report.main()
    words = " ".join(check((tmp_path / "out" / "both.html").read_text()).words)
    assert "again − <u>run" in words and "no clear difference" in words
    assert "0 of" in words and "settings differ" in words
    assert capfd.readouterr().out.startswith(str(tmp_path / "out" / "both.html"))


def test_a_folder_without_a_run_is_an_error_of_one_line(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path), f"--output={tmp_path / 'x.html'}"])
    monkeypatch.setattr(report, "show_log", lambda: None)
    with pytest.raises(SystemExit):
        report.main()
    assert "is not a workdir" in capfd.readouterr().err and not (tmp_path / "x.html").exists()


def test_a_page_that_fails_does_not_stop_the_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(report, "report", lambda runs: 1 / 0)
    train.train(tiny_config("classifier"), tmp_path)
    assert train.is_finished(tmp_path) and not (tmp_path / "report.html").exists()
    assert "report.html could not be written" in caplog.text


def fabricated(title: str, order: list[int], right: list[int], loss: list[float]) -> report.Run:
    """A run whose images come in some order; `right` and `loss` are of images 0, 1, … of the source."""
    right, loss = np.array(right)[order], np.array(loss)[order]
    images = {"top1": right, "top5": np.ones_like(right), "loss": loss, "index": np.array(order)}
    total = {"count": len(order), **{name: images[name].sum() for name in ("top1", "top5", "loss")}}
    networks = SimpleNamespace(task=CLASSIFICATION, outputs=("a", "b"))
    source = SimpleNamespace(key=lambda i: f"image {i}")
    return report.Run(title, None, Measurement(scores(total), Sums(total, images), networks, None, source, None))


def test_differences_are_of_the_same_images_by_hand():
    first = fabricated("first", [3, 1, 0, 2], [1, 0, 0, 1, 1], [0.5, 2.0, 1.0, 0.1, 9])
    second = fabricated("second", [0, 1, 2, 4], [1, 1, 1, 0, 0], [0.4, 1.0, 0.7, 9, 0])
    by_name = {x.score: x for x in report.paired(first, second)}  # images 0, 1 and 2
    assert {x.images for x in by_name.values()} == {3}
    assert by_name["top1"].value == pytest.approx(100 * (3 - 1) / 3) and by_name["top1"].only == (0, 2)
    assert by_name["loss"].value == pytest.approx((0.4 + 1.0 + 0.7 - 0.5 - 2.0 - 1.0) / 3)
    assert by_name["loss"].interval.low < by_name["loss"].value < by_name["loss"].interval.high < 0
    assert "better" in "".join(report.differences([first, second]))


def test_runs_on_other_images_are_not_compared():
    first = fabricated("first", [0, 1], [1, 0], [0.5, 2.0])
    second = fabricated("second", [2, 3], [0, 0, 1, 1], [0, 0, 1, 1])
    assert report.paired(first, second) == []
    assert "Not compared" in "".join(report.differences([first, second]))


def test_data_of_a_script_cannot_end_it():
    text = page.confusion(np.array([[1, 0], [2, 3]]), ["</script><script>alert(1)</script>", "b\x00\u202e"])
    checked = Checked(text)
    assert [tag for tag, _ in checked.elements].count("script") == 1
    assert '"cells":[[0,0,1],[1,0,2],[1,1,3]]' in text and "\x00" not in text and "\u202e" not in text


def test_the_most_confused_pairs():
    matrix = np.array([[5, 2, 0], [1, 8, 1], [0, 6, 4]])
    assert report.most_confused(matrix, "abc")[:2] == [("c", "b", 6, 60.0), ("a", "b", 2, pytest.approx(100 * 2 / 7))]


def test_charts_have_round_ticks_that_enclose_the_points():
    for low, high in ((0.0, 1.0), (3.2, 3.3), (0, 87), (5, 5), (-2e-6, 1e-5)):
        ticks = page._ticks(low, high)
        assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 7
    assert page._logarithmic_ticks(np.log10(0.6), np.log10(3)) == pytest.approx(np.log10([0.5, 1, 2, 5]))
    assert page.chart("nothing", [page.Line("a", [(0, float("nan"))], 0)]) == ""


def test_titles_are_as_short_as_they_can_be(tmp_path):
    assert report.titles([tmp_path / "a" / "x", tmp_path / "b" / "y"]) == ["x", "y"]
    assert report.titles([tmp_path / "a" / "x", tmp_path / "b" / "x"]) == ["a/x", "b/x"]
    with pytest.raises(ValueError, match="named twice"):
        report.titles([tmp_path, tmp_path])
