"""`untwine theory`: figures and numbers come out, bad input gets one sentence."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from untwine.cli import main

Call = Callable[..., tuple[int, str, str]]

QUICK = {
    "calibration": ["--groups", "200", "--draws", "20", "--tasks", "50", "--group-sizes", "2,5"],
    "squeezing": ["--points", "8", "--horizon", "50", "--ratios", "0.1,0.8", "--features", "3"],
    "regions": ["--starts", "6", "--horizon", "100"],
}


@pytest.fixture
def theory(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["untwine", "theory", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            main()
        captured = capsys.readouterr()
        return int(exit_info.value.code or 0), captured.out, " ".join(captured.err.split())

    return call


@pytest.mark.parametrize("name", QUICK)
def test_tables_a_verdict_and_a_figure(theory: Call, tmp_path: Path, name: str) -> None:
    code, out, err = theory(name, *QUICK[name], "--out", tmp_path / "new")
    assert code == 0, err
    figure = tmp_path / "new" / f"{name}.svg"
    assert figure.read_text().rstrip().endswith("</svg>")
    assert f"figure: {figure}" in err
    verdict = {
        "calibration": "is negative at all 2916 points",
        "squeezing": "NOT reproduced",
        "regions": "are lifted at first",
    }
    assert verdict[name] in " ".join(out.split())


@pytest.mark.parametrize("name", QUICK)
def test_json_holds_the_numbers(theory: Call, tmp_path: Path, name: str) -> None:
    code, out, err = theory(name, *QUICK[name], "--out", tmp_path, "--format", "png", "--json")
    assert code == 0, err
    numbers = json.loads(out)
    assert Path(numbers["figure"]).read_bytes().startswith(b"\x89PNG")
    assert len(numbers["verdict"]) > 100


def test_measured_points_and_the_default_folder(
    theory: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"q": 0.95, "push": 0.05, "q_other": 0.4, "label": "repeat"}, {"q": 0.5, "push": 0.01}]
    Path("points.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, out, err = theory("regions", *QUICK["regions"], "--points", "points.jsonl")
    assert code == 0, err
    assert "1 of 2 measured points have a coupled push above" in " ".join(out.split())
    assert Path("runs/theory-regions/regions.svg").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["calibration", "--group-sizes", "2,x"], "--group-sizes takes whole numbers"),
        (["calibration", "--group-sizes", "2.5"], "--group-sizes takes whole numbers"),
        (["calibration", "--group-sizes", "nan"], "--group-sizes takes whole numbers"),
        (["calibration", "--group-sizes", "1"], "a group of one has no baseline"),
        (["squeezing", "--ratios", ","], "--ratios takes numbers"),
        (["squeezing", "--ratios", "1.5"], "between 0 and 1, not 1.5"),
        (
            ["squeezing", "--good-worst", "0.9", "--good-mild", "0.9", "--flawed", "-0.9"],
            "overlaps",
        ),
        (["regions", "--overlap", "2"], "overlap must lie between 0 and 1"),
        (["regions", "--format", "pgn"], "Did you mean 'png'"),
        (["regions", "--points", "nothing.jsonl"], "cannot read the points in nothing.jsonl"),
        (["regions", "--group-size", "1"], "--group-size"),
        (["regions", "--horizon", "inf"], "positive and finite, not inf"),
        (["region"], "No such command"),
    ],
)
def test_bad_input_gets_one_sentence(
    theory: Call, tmp_path: Path, arguments: list[str], words: str
) -> None:
    code, _, err = theory(*arguments, *(["--out", tmp_path / "x"] if len(arguments) > 1 else []))
    assert code == 2
    assert err.count("error:") == 1
    assert "Traceback" not in err
    assert words in err
    assert not (tmp_path / "x").exists()


def test_an_output_that_is_a_file(theory: Call, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    code, _, err = theory("regions", *QUICK["regions"], "--out", file)
    assert code == 2
    assert "is not a folder" in err
    code, _, err = theory("regions", *QUICK["regions"], "--out", file / "inside")
    assert code == 2
    assert "cannot write" in err
    assert file.read_text() == "mine"


def test_help_teaches(theory: Call) -> None:
    code, out, _ = theory("--help")
    assert code == 0
    assert all(name in out for name in QUICK)
    code, out, _ = theory("regions", "--help")
    assert "untwine theory regions --points probes.jsonl" in " ".join(out.split())
