"""Plots and the HTML report: axes, data, missing keys, hostile texts, no reference to the network."""

import html
import html.parser
import json
import math
import re
from importlib import resources

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from opd_jax.config_files import dump_config, parse_config
from opd_jax.errors import InputError
from opd_jax.tracking import plots
from opd_jax.tracking.report import gap_recovery, write_report
from opd_jax.tracking.run_dir import open_run
from opd_jax.tracking.writers import MetricWriter

HOSTILE = "</pre><script>alert(1)</script><img src='http://evil.example/x.png' onerror=alert(1)>"


def _run(path, steps=12, objective=None, empty=False):
    tree = {"run_dir": str(path), "steps": steps, "student": {"path": "models/s<1>"}, "teacher": {"path": "models/t"}}
    tree |= {"data": {"source": "task:products"}, "rollout": {"max_response": 40}, "objective": objective or {}}
    run = open_run(path, dump_config(parse_config(tree)), resume=False)
    if empty:
        return run
    with MetricWriter(run) as writer:
        writer.write_evaluation(0, {"who": "teacher", "accuracy": 0.9, "accuracy_se": 0.01})
        before = {"accuracy": 0.2, "accuracy_se": 0.02, "reverse_kl": 0.3, "overlap_ratio": 0.7, "problems": 64}
        writer.write_evaluation(0, {"who": "student", **before, "samples": 2})
        for step in range(1, steps + 1):
            row = {
                "loss": 1 / step,
                "reverse_kl": 1 / step,
                "time/rollout": 0.3,
                "time/update": 0.1 if step > 1 else 9.0,
                "tokens_per_second/rollout": 1500.0,
            }
            if step == 4:
                row["time/evaluation"] = 2.2
            writer.write(step, row | {"reverse_kl_by_position": [0.1, 0.2, 0.3, None], "own_metric": 1.0})
        after = {"accuracy": 0.8, "accuracy_se": 0.02, "reverse_kl": 0.05, "overlap_ratio": 0.8, "problems": 64}
        writer.write_evaluation(steps, {"who": "student", **after, "samples": 2})
        writer.write_samples(0, [{"problem": HOSTILE, "answer": HOSTILE, "response": HOSTILE, "correct": False}])
        writer.write_samples(steps, [{"problem": HOSTILE, "response": "after", "correct": True, "kl_by_token": [1, 3]}])
    return run


class _Page(html.parser.HTMLParser):
    """Tags, attributes that load something, and the visible text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.loads, self.handlers, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [v for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "data", "action")]
        self.handlers += [k for k, _ in attrs if k.startswith("on")]

    def handle_data(self, data):
        self.text += data


def _page(runs, path):
    write_report(runs, path)
    text = path.read_text()
    return text, _Page(text)


def test_report_is_self_contained_and_shows_hostile_text_as_text(tmp_path):
    text, page = _page(_run(tmp_path / "run"), tmp_path / "report.html")
    assert not {"script", "img", "link", "iframe", "object"} & set(page.tags)
    assert not page.handlers
    assert page.loads
    assert all(target.startswith("#") for target in page.loads)
    assert not re.search(r"url\((?!#)", text)
    assert "@import" not in text
    assert "default-src 'none'" in text
    assert page.text.count(HOSTILE) == 3  # problem, answer, response
    assert "models/s<1> ← models/t" in page.text


def test_report_holds_the_numbers(tmp_path):
    run = _run(tmp_path / "run")
    _, page = _page(run, run.report)
    for expected in (
        "gap recovery rate",
        "0.857",  # (0.8 − 0.2) / (0.9 − 0.2)
        "0.200 ± 0.020",
        "0.800 ± 0.020",
        "+0.600 ± 0.028",  # √2 · 0.02
        "−0.250",
        "0.900 ± 0.010",
        "overlap@16",
        "64 problems × 2 samples each",
        "✗ wrong",
        "✓ correct",
        "reverse KL 2.000 nats/token, 2 tokens",
        "50%",  # 11 times a rollout of 0.3 s and an update of 0.1 s, the compiling step left out
        "33%",  # one evaluation of 2.2 s
        "1,500",
        "seed: 0",
        "packages",
    ):
        assert expected in page.text, expected
    # loss, accuracy, reverse KL, overlap, own metric; one by position
    assert page.tags.count("figure") == 6


def test_report_of_a_run_without_logs(tmp_path):
    run = _run(tmp_path / "run", empty=True)
    _, page = _page(run, run.report)
    assert "No evaluation was logged yet." in page.text
    assert "figure" not in page.tags
    run.environment.unlink()
    write_report(run, run.report)


@pytest.mark.parametrize("kept", ["metrics", "samples", "evaluations"])
def test_report_of_a_run_with_one_log(tmp_path, kept):
    run = _run(tmp_path / "run", steps=2)
    for name in {"metrics", "samples", "evaluations"} - {kept}:
        getattr(run, name).unlink()
    _, page = _page(run, run.report)
    shown = {"metrics": "Where the time goes", "samples": "Sampled rollouts", "evaluations": "gap recovery rate"}
    assert [name for name, text in shown.items() if text in page.text] == [kept]
    assert ("75%" in page.text) == (kept == "metrics")  # of two steps, the compiling one does not count


def test_report_of_rows_with_missing_keys(tmp_path):
    run = _run(tmp_path / "run", empty=True)
    with MetricWriter(run) as writer:
        writer.write(1, {})
        writer.write(2, {"loss": float("nan"), "reverse_kl_by_position": []})
        writer.write_evaluation(0, {"accuracy": None, "response_length": 8})
        writer.write_samples(0, [{}])
    _, page = _page(run, run.report)
    assert "response length (tokens)" in page.text
    assert "step 0" in page.text


def test_report_of_several_runs(tmp_path):
    runs = [_run(tmp_path / "a" / "run"), _run(tmp_path / "b" / "run", objective={"name": "topk"})]
    _, page = _page(runs, tmp_path / "report.html")
    assert "Comparison" in page.text
    assert page.text.count(str(tmp_path / "b" / "run")) >= 3  # runs of one name are told apart by their path
    assert page.tags.count("figure") == 5 + 2
    with pytest.raises(InputError, match="no run given"):
        write_report([], tmp_path / "x.html")


def test_gap_recovery_against_finite_differences():
    rows = [{"accuracy": a, "accuracy_se": e} for a, e in ((0.2, 0.02), (0.7, 0.015), (0.9, 0.01))]
    result = gap_recovery(*rows)
    assert result is not None
    rate, error = result
    assert rate == pytest.approx(0.5 / 0.7)

    def recovery(before, after, teacher):
        return (after - before) / (teacher - before)

    point, step = [0.2, 0.7, 0.9], 1e-6
    slopes = [(recovery(*np.add(point, step * np.eye(3)[i])) - recovery(*point)) / step for i in range(3)]
    assert error == pytest.approx(
        math.hypot(*(s * r["accuracy_se"] for s, r in zip(slopes, rows, strict=True))), rel=1e-4
    )
    assert gap_recovery(rows[0], rows[1], {"accuracy": 0.1}) is None
    assert gap_recovery(rows[0], rows[1], {}) is None
    assert gap_recovery(rows[0], rows[1], {"accuracy": 0.9}) == (pytest.approx(0.5 / 0.7), None)


def test_curves_have_axes_names_and_data():
    rows = [{"step": s, "reverse_kl": 1 / s, "gradient_norm": None if s == 2 else 2.0} for s in range(1, 6)]
    evaluations = [
        {"step": 0, "who": "teacher", "accuracy": 0.9},
        {"step": 0, "who": "student", "accuracy": 0.2, "accuracy_se": 0.1},
        {"step": 5, "who": "student", "accuracy": 0.6, "accuracy_se": 0.1},
    ]
    names = ["reverse_kl", "gradient_norm", "accuracy", "overlap_ratio"]
    figure = plots.curves({"run": rows}, names, {"run": evaluations}, k=4)
    assert isinstance(figure, Figure)
    assert [ax.get_ylabel() for ax in figure.axes] == [
        "reverse KL (nats/token)",
        "gradient norm",
        "accuracy",
        "overlap@4",
    ]
    assert {ax.get_xlabel() for ax in figure.axes} == {"step"}
    kl, norm, accuracy, overlap = figure.axes
    np.testing.assert_allclose(np.array(kl.lines[0].get_xydata()), [[s, 1 / s] for s in range(1, 6)])
    np.testing.assert_array_equal(norm.lines[0].get_ydata(), [2.0, np.nan, 2.0, 2.0, 2.0])
    np.testing.assert_array_equal(np.array(accuracy.lines[0].get_xydata()), [[0, 0.2], [5, 0.6]])
    assert set(np.asarray(accuracy.lines[-1].get_ydata())) == {0.9}
    assert accuracy.get_legend_handles_labels()[1] == ["teacher", "held out"]
    assert not overlap.lines


def test_several_runs_have_a_legend_and_their_own_colours():
    runs = {name: [{"step": 1, "loss": i}, {"step": 2, "loss": i}] for i, name in enumerate(("full", "top-16"))}
    evaluations = {name: [{"step": s, "who": "student", "accuracy": 0.5} for s in (0, 2)] for name in runs}
    loss, accuracy = plots.curves(runs, ["loss", "accuracy"], evaluations).axes
    for ax in (loss, accuracy):
        legend = ax.get_legend()
        assert legend is not None
        assert [text.get_text() for text in legend.get_texts()] == ["full", "top-16"]
    assert loss.lines[0].get_color() != loss.lines[1].get_color()
    assert all(container[0].get_linestyle() == "-" for container in accuracy.containers)


def test_running_mean_against_a_loop():
    values = np.random.default_rng(0).normal(size=30)
    values[[3, 4, 5, 6, 7, 20]] = np.nan
    expected = []
    for i in range(30):
        held = [v for v in values[max(i - 2, 0) : i + 3] if np.isfinite(v)]
        expected.append(np.mean(held) if held else np.nan)
    np.testing.assert_allclose(plots._running_mean(values, 2), expected, rtol=1e-12)


def test_long_runs_are_smoothed_but_not_the_learning_rate():
    rows = [{"step": s, "loss": float(s % 2), "learning_rate": 0.3} for s in range(100)]
    loss, rate = plots.curves({"run": rows}, ["loss", "learning_rate"]).axes
    assert len(loss.lines) == 2
    assert np.ptp(np.asarray(loss.lines[1].get_ydata())) < 0.5
    np.testing.assert_array_equal(rate.lines[0].get_ydata(), [0.3] * 100)


def test_position_curves_average_first_and_last_steps():
    rows = [{"step": s, "entropy_gap_by_position": [float(s), 2.0 * s, None]} for s in range(1, 11)]
    rows[0]["entropy_gap_by_position"] = [1.0, None, None]
    assert plots.position_names(rows) == ["entropy_gap"]
    (ax,) = plots.position_curves(rows, ["entropy_gap"], max_response=60, average=3).axes
    assert ax.get_xlabel() == "output position (tokens)"
    assert ax.get_ylabel() == "entropy gap (nats)"
    np.testing.assert_allclose(np.asarray(ax.lines[0].get_xdata()), [10, 30, 50])
    np.testing.assert_allclose(np.asarray(ax.lines[0].get_ydata()), [2.0, 5.0, np.nan])
    np.testing.assert_allclose(np.asarray(ax.lines[1].get_ydata()), [9.0, 18.0, np.nan])
    assert [line.get_label() for line in ax.lines] == ["first steps, 1–3", "last steps, 8–10"]


def test_figures_are_saved_as_png_and_svg(tmp_path):
    figure = plots.curves({"run": [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]}, ["loss"])
    plots.save(figure, tmp_path / "a.png")
    plots.save(figure, tmp_path / "a.svg")
    image = Image.open(tmp_path / "a.png").convert("RGB")
    assert image.width > 600
    assert image.getpixel((1, 1)) == (255, 255, 255)
    text = (tmp_path / "a.svg").read_text()
    assert text.startswith("<svg")
    assert "<metadata" not in text
    assert text == plots.svg(figure)  # the same figure, the same bytes


def test_style_file_is_part_of_the_package():
    assert (resources.files("opd_jax.tracking") / "report.css").is_file()


def _spans(text, number=0):
    """(class, tabindex, what is shown on pointing, text) of the tokens of a rollout."""
    shown = text.split("<pre>")[number + 1].partition("</pre>")[0]
    found = re.findall(r'<span(?: class="(.*?)")? tabindex="(.*?)" data-t="(.*?)">(.*?)</span>', shown, re.DOTALL)
    return [tuple(html.unescape(part) for part in span) for span in found]


def test_tokens_of_older_runs_are_coloured_by_their_divergence(tmp_path):
    run = _run(tmp_path / "run", empty=True)
    tokens, kl = ["a", " <b>", "\n", HOSTILE, "e"], [0.01, 0.3, None, 2.5, 0.05]
    with MetricWriter(run) as writer:
        writer.write_samples(1, [{"problem": "p", "response": "without", "tokens": tokens, "kl_by_token": kl}])
        writer.write_samples(2, [{"problem": "p", "response": "cut short", "tokens": tokens, "kl_by_token": kl[:3]}])
    text, page = _page(run, run.report)
    assert [(css, shown) for css, _, _, shown in _spans(text)] == list(
        zip(["", "k2", "", "k5", "k1"], tokens, strict=True)
    )
    assert [t for *_, t, _ in _spans(text)][:2] == ["`a`  KL\xa00.010", "`␣<b>`  KL\xa00.300"]
    assert "samples only-kl" in text
    assert "script" not in page.tags
    assert "cut short" in page.text  # values that do not fit the tokens are not drawn


def _sample(n, known):
    """A response of ``n`` tokens with values of the first and last ``known / 2``."""
    at = [*range(known // 2), *range(n - known // 2, n)]
    return {
        "who": "student", "problem": "p", "response": "text", "tokens": [f" <{i}>" for i in range(n)],
        "kl_by_token": [0.1] * known, "logp": [math.log(0.01)] * known,
        "logq": [math.log(0.01) + (i % 9 - 4) / 2 for i in at],
        "top_student": [[[f"<s{i}>", 0.5], ["\n", 0.00003]] for i in at], "top_teacher": [[["t", None]]] * known,
    }  # fmt: skip


def test_tokens_are_coloured_by_their_advantage(tmp_path):
    run = _run(tmp_path / "run", empty=True)
    with MetricWriter(run) as writer:
        writer.write_samples(0, [{"who": "teacher", "problem": "p", "response": "as the teacher says"}, _sample(9, 4)])
        writer.write_samples(5, [_sample(8, 8)])
    text, page = _page(run, run.report)
    assert "samples only-kl" not in text
    spans = _spans(text)
    # −2, −1.5, then 1.5, 2 nats: the middle of the response has no values
    assert [css for css, *_ in spans] == ["n4 k1", "n3 k1", "p3 k1", "p4 k1"]
    assert [shown for *_, shown in spans] == [" <0>", " <1>", " <7>", " <8>"]
    assert spans[2][2].replace("\xa0", " ") == (
        "`␣<7>`  p 0.01  q 0.0448  log q − log p +1.50  KL 0.100\nstudent: `<s7>` 0.500  `⏎` 3e-05\nteacher: `t` –"
    )
    assert "".join(f" <{i}>" for i in range(9)) in page.text
    assert "first and last 2 of 9 tokens" in page.text
    whole = _spans(text, 1)
    assert [css for css, *_ in whole] == ["n4 k1", "n3 k1", "n3 k1", "n2 k1", "k1", "p2 k1", "p3 k1", "p3 k1"]
    assert [tab for _, tab, *_ in whole] == ["0"] * 4 + ["-1"] + ["0"] * 3  # where nothing differs, Tab does not stop
    assert page.text.index("as the teacher says") > page.text.index("step 5")


def test_a_rollout_of_any_length_stays_small(tmp_path):
    run = _run(tmp_path / "run", empty=True)
    with MetricWriter(run) as writer:
        writer.write_samples(0, [{"problem": "long text", "response": "x" * 50_000}, _sample(30_000, 768)])
    text, page = _page(run, run.report)
    assert len(text) < 500_000
    assert "… 30,000 more characters in samples.jsonl" in page.text
    tabs = [tab for _, tab, *_ in _spans(text, 1)]
    assert (len(tabs), tabs.count("0")) == (768, 12)


def test_an_alarm_is_in_the_report(tmp_path):
    run = _run(tmp_path / "run")
    assert "Signs of a collapse" not in _page(run, tmp_path / "quiet.html")[0]
    lines = run.metrics.read_text().splitlines()
    lines[7] = json.dumps(json.loads(lines[7]) | {"alarm": "overlap went from 0.80 to 0.41"})
    run.metrics.write_text("\n".join(lines) + "\n")
    page, _ = _page(run, tmp_path / "loud.html")
    assert "Signs of a collapse" in page
    assert "overlap went from 0.80 to 0.41" in page
