"""Signals that end a command, in this process; `test_cli.py` sends them to whole commands."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from edgetube import interrupts

pytestmark = pytest.mark.usefixtures("heard_signals")


@pytest.mark.parametrize("number", interrupts.SIGNALS)
def test_a_signal_raises_in_the_block_and_the_handlers_are_put_back(number: int) -> None:
    before = signal.getsignal(number)
    handled = interrupts.Handled()
    with pytest.raises(KeyboardInterrupt), handled:
        signal.raise_signal(number)
    assert handled.exit_code == 128 + number
    assert signal.getsignal(number) is before
    interrupts.check()


def swallow() -> None:
    with contextlib.suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        interrupts.check()


def wrap() -> None:
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt as error:
        raise RuntimeError("the tracer failed") from error


def test_what_a_library_swallows_is_raised_again() -> None:
    with pytest.raises(KeyboardInterrupt), interrupts.Handled():
        swallow()


def test_an_error_that_wraps_a_signal_is_the_signal() -> None:
    with pytest.raises(KeyboardInterrupt) as caught, interrupts.Handled():
        wrap()
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_signal_in_a_finaliser_is_not_lost(capsys: pytest.CaptureFixture[str]) -> None:
    class Dying:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), interrupts.Handled():
        Dying()
    assert capsys.readouterr().err == ""


def test_a_second_signal_does_not_disturb_the_cleaning_up() -> None:
    done = []

    class Work:
        def close(self) -> None:
            signal.raise_signal(signal.SIGTERM)
            done.append(True)

    with pytest.raises(KeyboardInterrupt), interrupts.Handled(), contextlib.closing(Work()):
        signal.raise_signal(signal.SIGINT)
    assert done


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_signals_wait_while_a_process_is_started() -> None:
    seen = []

    def start() -> None:
        with interrupts.kept_from_children():
            signal.raise_signal(signal.SIGTERM)
            code = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
            seen.append(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)

    handled = interrupts.Handled()
    with pytest.raises(KeyboardInterrupt), handled:
        start()
    assert handled.received == signal.SIGTERM
    assert seen == ["True\n"]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_other_threads_change_nothing() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def inside() -> None:
        with interrupts.Handled():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("interrupts.leave_at_once(); print('ready', flush=True); time.sleep(60)", 143),
        (
            "interrupts.PATIENCE_S = 0.2\nwith interrupts.Handled():\n try:\n  print('ready', flush=True); "
            "time.sleep(60)\n finally:\n  print('ready', flush=True); time.sleep(60)",
            143,
        ),
    ],
)
def test_a_process_that_hangs_in_its_cleaning_up_can_be_ended(body: str, code: int) -> None:
    program = f"import time\nfrom edgetube import interrupts\n{body}"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(body.count("ready")):
            process.stdout.readline()
            time.sleep(0.3)  # longer than the patience of the second one
            os.kill(process.pid, signal.SIGTERM)
        assert process.wait() == code
        assert process.stderr is not None
        assert process.stderr.read() == b""
