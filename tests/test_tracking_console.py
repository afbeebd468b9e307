"""Console: plain lines in a pipe, live bars on a terminal, from several threads; numbers as people read them."""

import io
import threading

import pytest
from rich.console import Console as Terminal

from opd_jax.tracking import console as module
from opd_jax.tracking.console import Console
from opd_jax.tracking.labels import axis_label, format_duration, format_value, in_order


def _console(tty=False, width=120):
    file, errors = io.StringIO(), io.StringIO()
    out = Terminal(file=file, force_terminal=tty, width=width, highlight=False, color_system=None)
    return Console(out, Terminal(file=errors, width=width, color_system=None)), file, errors


class _Clock:
    """time.monotonic under the test's control."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)


@pytest.mark.parametrize(
    ("seconds", "lines"),
    [
        (0.01, 1 + 4),  # a short run: one line every 2 s and the end
        (3.0, 100),  # every hundredth of the run
        (120.0, 1000),  # a step takes longer than a minute: every step
    ],
)
def test_a_log_of_1000_steps_stays_readable(monkeypatch, seconds, lines):
    clock = _Clock(monkeypatch)
    console, file, _ = _console()
    with console.progress(total=1000, title="OPD") as bar:
        for step in range(1, 1001):
            clock.now += seconds
            bar.update(step, {"loss": 0.5})
    printed = file.getvalue().splitlines()
    assert abs(len(printed) - lines) <= 1
    assert printed[-1].startswith("  OPD  1,000/1,000  loss 0.500  took ")


def test_a_line_holds_metrics_rate_and_time_left(monkeypatch):
    clock = _Clock(monkeypatch)
    console, file, _ = _console(width=40)
    row = {"loss": 0.25, "reverse_kl": 0.5, "tokens_per_second": 1234.5, "gradient_norm": 9.0}
    with console.progress(total=100, title="OPD [full]", start=40) as bar:
        clock.now += 60  # the first step compiles: not part of the rate
        bar.update(41, row)
        clock.now += 4
        bar.update(42, row)
        assert bar.rate() == pytest.approx(0.25)
    assert file.getvalue().splitlines() == [
        "  OPD [full]  41/100  loss 0.250  KL 0.500  tok/s 1,234  1:00",
        "  OPD [full]  42/100  loss 0.250  KL 0.500  tok/s 1,234  4.0 s/step  3:52 left",
    ]


def test_newer_metrics_without_a_step_do_not_change_the_rate(monkeypatch):
    clock = _Clock(monkeypatch)
    console, _, _ = _console()
    with console.progress(total=100, title="generating") as bar:
        for step in (0, 4, *[8] * 50):
            clock.now += 2
            bar.update(step, {"loss": 1.0})
        assert bar.rate() == 2.0


def test_shown_metrics_can_be_chosen():
    console, file, _ = _console()
    with console.progress(total=2, title="layers", unit="candidate", show=("forward_kl", "dropped")) as bar:
        bar.advance({"forward_kl": 0.1, "dropped": "4,5"})
        bar.advance()
    assert "layers  2/2  forward KL 0.100  dropped 4,5  took" in file.getvalue()


def test_bars_of_two_threads_share_a_terminal():
    console, file, _ = _console(tty=True, width=100)
    both = threading.Barrier(2)

    def work(title):
        with console.progress(total=3, title=title) as bar:
            for step in range(1, 4):
                both.wait(timeout=10)
                bar.update(step, {"loss": 1.0})

    threads = [threading.Thread(target=work, args=(name,)) for name in ("teacher", "student")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert file.getvalue().count("teacher  3/3  loss 1.000  took") == 1
    assert file.getvalue().count("student  3/3  loss 1.000  took") == 1
    assert console._live is None


def test_an_exception_closes_the_live_display():
    console, file, _ = _console(tty=True)

    def interrupted():
        with console.stage("distil"), console.progress(total=3, title="x") as bar:
            bar.update(1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert console._live is None
    assert file.getvalue().count("\x1b[?25h") == 1  # the cursor is shown again
    assert "✗ distil  stopped after" in file.getvalue()


def test_tables_stages_and_errors_take_text_literally():
    console, file, errors = _console(width=60)
    with console.stage("stage [1/2]"):
        console.table("Scores [x]", ["", "before"], [["KL [nats]", (0.299, 0.0101)], ["accuracy", None]])
    console.error("configs/a.yaml: [optimizer] unknown key that makes a line longer than the sixty columns there are")
    text = file.getvalue()
    assert "▸ stage [1/2]" in text
    assert "✓ stage [1/2]  0.0 s" in text
    assert "Scores [x]" in text
    assert "0.299 ± 0.010" in text
    assert "–" in text
    assert errors.getvalue().startswith("error: configs/a.yaml: [optimizer] unknown")
    assert len(errors.getvalue().splitlines()) == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (0.0, "0.000"),
        (3e-6, "3.0e-06"),
        (-0.00312, "-0.0031"),
        (0.4321, "0.432"),
        (38.25, "38.25"),
        (512.34, "512.3"),
        (12345.6, "12,346"),
        (1234, "1,234"),
        (True, "yes"),
        ("text", "text"),
        ((0.968, 0.004), "0.968 ± 0.004"),
        ((0.003, 0.0002), "0.0030 ± 0.0002"),
        ((0.5, None), "0.500"),
        ((None, None), "–"),
        ((1234.5, 0.2), "1,234.5 ± 0.2"),
        ((0.5, 1e-9), "0.500 ± 1.0e-09"),
        ((2e-5, 3e-6), "0.000020 ± 0.000003"),
        ((0.5, 0.0), "0.500 ± 0.000"),
    ],
)
def test_numbers(value, text):
    assert format_value(value) == text


def test_durations():
    assert [format_duration(s) for s in (4.24, 59.96, 65, 7265)] == ["4.2 s", "1:00", "1:05", "2:01:05"]


def test_labels():
    assert axis_label("overlap_ratio", 16) == "overlap@16"
    assert axis_label("own_metric") == "own metric"
    assert in_order(["zeta", "accuracy", "alpha", "loss"]) == ["loss", "accuracy", "alpha", "zeta"]
