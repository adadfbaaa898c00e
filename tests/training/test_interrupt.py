import os
import signal
import threading

import pytest

from atom_jax.sharding import MeshConfig, make_mesh
from atom_jax.training.interrupt import GO, SAVE, STOP, Agreement, Interrupts


def test_the_first_signal_is_noted_and_the_second_ctrl_c_leaves(monkeypatch, capfd):
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    before = signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGTERM)
        assert interrupts.signal == signal.SIGTERM and not left
        signal.raise_signal(signal.SIGTERM)
        assert not left
        signal.raise_signal(signal.SIGINT)
        assert left == [130]
    assert signal.getsignal(signal.SIGINT) is before
    assert "Ctrl-C again leaves at once" in capfd.readouterr().err


def test_other_threads_may_train():
    def enter():
        with Interrupts() as interrupts:
            found.append(interrupts.signal)

    found = []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [0]


@pytest.mark.parametrize("minutes, interrupted, answer", [(0, False, GO), (1e-9, False, SAVE), (1e-9, True, STOP)])
def test_what_to_do_after_a_step(minutes, interrupted, answer):
    assert Agreement(make_mesh(MeshConfig()), minutes).ask(interrupted) == answer


def test_saving_starts_the_clock_anew(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    agreement = Agreement(make_mesh(MeshConfig()), minutes=1)
    now[0] = 61.0
    assert agreement.ask(False) == SAVE
    agreement.saved()
    assert agreement.ask(False) == GO
