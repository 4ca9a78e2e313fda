"""The walk on a line, played by a really tiny policy; the diagnose commands, called."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from tests.diagnose.untwine_chain_env import ChainEnv
from tests.test_cli import Result
from untwine.cli import main
from untwine.config import PromptConfig, SamplingConfig
from untwine.envs import registry
from untwine.envs.pool import EnvPool
from untwine.policy.loading import Policy
from untwine.rollout import Collector

MakeCollector = Callable[..., Collector]


@pytest.fixture
def chain_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    monkeypatch.setattr(ChainEnv, "resets", 0)
    registry.register_family("chain", "tests.diagnose.untwine_chain_env:FAMILY")


@pytest.fixture
def make_chain(chain_family: None, policy: Policy) -> MakeCollector:
    """A collector on the walk, three steps long; keywords are options of the environment."""

    def make(sampling: SamplingConfig | None = None, **options: object) -> Collector:
        pool = EnvPool(
            "chain", {"list_commands": True, **options}, workers=0, sessions=16, timeout_s=5.0
        )
        sampling = sampling or SamplingConfig(constrained=True)
        return Collector(policy, pool, 3, PromptConfig(), sampling)

    return make


@pytest.fixture
def untwine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["untwine", "diagnose", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "160")
        with pytest.raises(SystemExit) as exit_info:
            main()
        captured = capsys.readouterr()
        code = exit_info.value.code
        return Result(code if isinstance(code, int) else 0, captured.out, captured.err)

    return call
