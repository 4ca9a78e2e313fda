"""A signal asks to stop, a second one stops."""

from __future__ import annotations

import os
import signal

import pytest

from untwine.errors import Interrupted
from untwine.training.signals import StopRequest


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_stops(signum: signal.Signals) -> None:
    before = signal.getsignal(signum)
    with StopRequest("`again`") as stop:
        stop.check()
        assert not stop.requested
        os.kill(os.getpid(), signum)
        assert stop.requested
        with pytest.raises(
            Interrupted, match=f"stopped by {signum.name}; .* with `again`"
        ) as found:
            stop.check()
        assert found.value.exit_code == 128 + signum
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signum)
    assert signal.getsignal(signum) == before
