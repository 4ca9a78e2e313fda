"""Table, figure and page of a comparison."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from tests.compare.finished_runs import write_arm
from untwine.compare.numbers import compare_runs
from untwine.compare.show import percent, print_comparison, write_comparison

HOSTILE = "</script><img src=x onerror=alert(1)> $x_[red]"


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    hostile = write_arm(tmp_path / "a", [0.4, 0.6, 0.5], name=HOSTILE)
    gcd = {"objective": "generative/ce"}
    return [*hostile, *write_arm(tmp_path / "b", [0.5, 0.6], name="GCD", gcd=gcd)]


def test_the_table_shows_every_arm_and_note(runs: list[Path]) -> None:
    numbers = compare_runs(runs)
    console = Console(width=220)
    with console.capture() as capture:
        print_comparison(numbers, console)
    text = capture.get()
    assert "[red]" in text
    assert "45.0 [35.0, 55.0]" in text  # IQM of .3 .4 .4 .5 .5 .6, one cut from each end
    # .5 and .6 against .4, .6 and .5: three won, one lost, two ties; pairs differ by .1 and 0
    assert re.search(r"GCD +66\.7 \[.*\] +2 +\+5\.0 \[-58\.5, \+68\.5\] +1 ", text)
    assert "GCD lacks seed 2." in text
    assert re.search(r"GCD +30 +10 +6 s +0 s", text)  # beside every comparison, what it cost


def test_percent() -> None:
    assert percent(0.4311, (0.38, 0.482)) == "43.1 [38.0, 48.2]"
    assert percent(-0.02, None, sign="+") == "-2.0"


def test_the_page_is_complete_and_safe(runs: list[Path], tmp_path: Path) -> None:
    numbers = compare_runs(runs)
    page = write_comparison(numbers, tmp_path / "out")
    html = page.read_text()
    assert "<img src=x" not in html
    assert "&lt;/script&gt;" in html
    assert "<script" not in html
    assert not re.search(r"""(src|href)=["'](?!data:)""", html)
    (style,) = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"sha256-{digest}" in html
    (image,) = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', html)
    figure = base64.b64decode(image)
    assert figure == (tmp_path / "out" / "compare.svg").read_bytes()
    assert ElementTree.fromstring(figure).tag.endswith("svg")
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == numbers


def test_the_same_numbers_give_the_same_files(runs: list[Path], tmp_path: Path) -> None:
    pages = [write_comparison(compare_runs(runs), tmp_path / name) for name in ("one", "two")]
    assert pages[0].read_bytes() == pages[1].read_bytes()
