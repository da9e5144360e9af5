"""What becomes of a launcher's signals."""

from __future__ import annotations

import os
import signal

import pytest

from raylaunch.torchrun.signals import Stopped, raising


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_is_raised_and_its_handler_is_put_back(number, code):
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stopped, raising([number]):
        os.kill(os.getpid(), number)
    assert stopped.value.code == code
    assert signal.getsignal(number) is before


def test_a_launcher_under_nohup_survives_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with raising([signal.SIGTERM, signal.SIGHUP]) as install_again:
            install_again()
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
