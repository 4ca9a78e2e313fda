"""The examples of the docs run as they stand, on a model from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.diagnose.reference import small_model
from untwine.policy.loading import Policy

DOCS = Path(__file__).parents[2] / "docs" / "diagnose"


def example(page: str) -> str:
    (code,) = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.M | re.S)
    return code


def test_coupling_of_a_model_from_elsewhere(
    policy: Policy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = small_model("qwen2", vocab_size=len(policy.tokenizer))
    model.save_pretrained(tmp_path / "my-model")
    policy.tokenizer.save_pretrained(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    exec(example("coupling.md"), {})
    printed = capsys.readouterr().out
    assert "Rate(flawed=2" in printed
    found = re.search(r"correlation ([\d.]+), slope ([\d.]+)", printed)
    assert found
    assert float(found[1]) > 0.99
    assert 0.9 < float(found[2]) < 1.1


def test_separation_of_plain_arrays(capsys: pytest.CaptureFixture[str]) -> None:
    exec(example("separation.md"), {})
    assert len(capsys.readouterr().out.splitlines()) == 3
