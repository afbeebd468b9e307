"""Run directory and logs: refusals, resuming without doubled rows, atomic files, valid JSON, readable events."""

import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue] (made by protobuf)
from tensorboardX.record_writer import masked_crc32c

from opd_jax.config_files import dump_config, parse_config
from opd_jax.errors import InputError
from opd_jax.tracking import run_dir, writers
from opd_jax.tracking.run_dir import RunDir, existing_run, open_run, read_rows, write_atomically
from opd_jax.tracking.writers import MetricWriter


def _config(**changes):
    tree = {"run_dir": "runs/a", "steps": 10, "student": {"path": "s"}, "teacher": {"path": "t"}}
    return dump_config(parse_config(tree | {"data": {"source": "task:products"}} | changes))


def test_fresh_run_writes_config_and_environment(tmp_path):
    run = open_run(tmp_path / "deep" / "run", _config(), resume=False)
    assert run.config.read_text() == _config()
    (start,) = json.loads(run.environment.read_text())
    assert start["packages"]["jax"] == jax.__version__
    assert start["packages"]["orbax-checkpoint"]
    assert start["device_count"] == jax.device_count() == sum(start["devices"].values())
    assert {"start_time", "command", "git_revision", "cpu", "platform", "python"} <= start.keys()


def test_fresh_run_refuses_a_used_directory(tmp_path):
    open_run(tmp_path, _config(), resume=False)
    before = (tmp_path / "environment.json").read_text()
    with pytest.raises(InputError, match=r"not empty.*--resume.*another run_dir"):
        open_run(tmp_path, _config(), resume=False)
    assert (tmp_path / "environment.json").read_text() == before


def test_a_kill_during_the_first_write_does_not_block_a_fresh_start(tmp_path):
    (tmp_path / ".config.yaml.tmp").write_text("half")
    open_run(tmp_path, _config(), resume=False)


def test_resume_refuses_where_there_is_no_run(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match=r"no run to resume.*without --resume"):
            open_run(path, _config(), resume=True)
    assert not (tmp_path / "absent").exists()
    with pytest.raises(InputError, match=r"no run here"):
        existing_run(tmp_path)


def test_resume_names_the_leaves_that_differ(tmp_path):
    run = open_run(tmp_path, _config(), resume=False)
    changed = _config(seed=3, optimizer={"lr": 1e-3}, data={"source": "x", "chat_arguments": {"think": False}})
    with pytest.raises(InputError) as caught:
        open_run(tmp_path, changed, resume=True)
    message = str(caught.value)
    assert "seed: the run has 0, now 3" in message
    assert "optimizer.lr: the run has 1e-06, now 0.001" in message
    assert "data.chat_arguments.think: the run has '(nothing)', now False" in message
    assert str(run.config) in message
    assert "run_dir" in message.splitlines()[-1]
    rollout = {"prompts": 1, "samples": 1, "max_response": 1, "temperature": 0.5, "top_p": 0.5, "top_k": 9}
    with pytest.raises(InputError, match="and 1 more"):
        open_run(tmp_path, _config(rollout=rollout), resume=True)


def test_steps_may_be_raised_but_not_lowered_and_the_directory_may_move(tmp_path):
    open_run(tmp_path, _config(), resume=False)
    run = open_run(tmp_path, _config(steps=20, run_dir="elsewhere/a"), resume=True)
    assert "steps: 20" in run.config.read_text()
    assert len(json.loads(run.environment.read_text())) == 2
    with pytest.raises(InputError, match=r"steps: the run has 20, now 15; it may only be raised"):
        open_run(tmp_path, _config(steps=15), resume=True)


def test_a_path_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match=r"cannot use this run directory"):
            open_run(path, _config(), resume=False)


def test_whole_files_are_replaced_in_one_go(tmp_path, monkeypatch):
    path = epath.Path(tmp_path / "a.json")
    write_atomically(path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(type(path), "replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        with pytest.raises(OSError, match="killed"):
            write_atomically(path, "new, but the machine stops before the rename")
    assert path.read_text() == "old"
    write_atomically(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_truncation_drops_later_and_half_written_rows(tmp_path):
    run = open_run(tmp_path, _config(), resume=False)
    with MetricWriter(run) as writer:
        writer.write_evaluation(0, {"who": "student", "accuracy": 0.1})
        for step in range(1, 6):
            writer.write(step, {"loss": step / 3})
            writer.write_samples(step, [{"response": "one\u2028line"}, {"response": "b"}])
        writer.write_evaluation(5, {"who": "student", "accuracy": 0.2})
    with open(run.metrics, "ab") as file:
        file.write('{"step": 3, "text": "é'.encode()[:-1])
    assert [row["step"] for row in read_rows(run.metrics)] == [1, 2, 3, 4, 5]
    run.truncate_after(3)
    assert read_rows(run.metrics) == [{"step": s, "loss": s / 3} for s in (1, 2, 3)]
    assert [row["step"] for row in read_rows(run.samples)] == [1, 1, 2, 2, 3, 3]
    assert read_rows(run.samples)[0]["response"] == "one\u2028line"
    assert [row["step"] for row in read_rows(run.evaluations)] == [0]
    with MetricWriter(run, restored_step=3) as writer:
        writer.write(4, {"loss": 4 / 3})
    assert [row["step"] for row in read_rows(run.metrics)] == [1, 2, 3, 4]
    assert run.metrics.read_text().endswith("\n")
    run.truncate_after(-1)
    assert read_rows(run.evaluations) == read_rows(run.metrics) == []


def test_rows_are_on_disk_at_once_and_valid_json(tmp_path):
    run = open_run(tmp_path, _config(), resume=False)
    with MetricWriter(run) as writer:
        metrics = {
            "loss": float("nan"),
            "kl_by_position": [1.0, float("inf")],
            "norm": jnp.float32(0.1),
            "low": jnp.bfloat16(0.5),
            "bins": np.array([1.0, np.nan]),
            "count": np.int64(3),
        }
        writer.write(1, metrics)
        (text,) = run.metrics.read_text().splitlines()
        row = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert row == {
            "step": 1,
            "loss": None,
            "kl_by_position": [1.0, None],
            "norm": float(np.float32(0.1)),
            "low": 0.5,
            "bins": [1.0, None],
            "count": 3,
        }
        writer.write_samples(1, [{"response": 'lone \ud800, quote ", newline \n, 中', "correct": np.bool_(True)}])
        (sample,) = read_rows(run.samples)
        assert sample["response"] == 'lone \ud800, quote ", newline \n, 中'
        assert sample["correct"] is True


def _events(run):
    """Decodes TFRecords by their published format, checksums included."""
    events = []
    for path in sorted(run.events.iterdir()):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            assert struct.unpack("<I", data[8:12])[0] == masked_crc32c(data[:8])
            body = data[12 : 12 + size]
            assert struct.unpack("<I", data[12 + size : 16 + size])[0] == masked_crc32c(body)
            events.append(Event.FromString(body))
            data = data[16 + size :]
    return events


def test_tensorboard_events_hold_the_scalars(tmp_path):
    run = open_run(tmp_path, _config(), resume=False)
    with MetricWriter(run) as writer:
        writer.write(1, {"loss": 0.25, "bad": float("nan"), "kl_by_position": [1.0, 2.0], "count": 2})
        writer.write_evaluation(1, {"who": "teacher", "accuracy": 0.75, "reverse_kl": None})
    first, *rest = _events(run)
    assert first.file_version == "brain.Event:2"
    scalars = {v.tag: (e.step, v.simple_value) for e in rest for v in e.summary.value}
    assert scalars == {"loss": (1, 0.25), "count": (1, 2.0), "evaluation/teacher/accuracy": (1, 0.75)}


def test_a_resumed_run_hides_events_after_the_restored_step(tmp_path):
    run = open_run(tmp_path, _config(), resume=False)
    with MetricWriter(run, restored_step=7):
        pass
    (start,) = [e for e in _events(run) if e.HasField("session_log")]
    assert (start.step, start.session_log.status) == (8, SessionLog.START)


def test_an_object_store_gets_the_whole_file_at_close(tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "_is_local", lambda path: False)
    run = open_run(tmp_path, _config(), resume=False)
    for step in (1, 2):
        with MetricWriter(run) as writer:
            writer.write(step, {"loss": 1.0})
    assert [row["step"] for row in read_rows(run.metrics)] == [1, 2]
    monkeypatch.setattr(writers, "_STORE_INTERVAL", -1.0)
    with MetricWriter(run) as writer:
        writer.write(3, {"loss": 1.0})
        assert [row["step"] for row in read_rows(run.metrics)] == [1, 2, 3]


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(run_dir.jax, "process_index", lambda: 1)
    run = open_run(tmp_path / "run", _config(), resume=False)
    assert run == RunDir(epath.Path(tmp_path / "run"))
    with MetricWriter(run) as writer:
        writer.write(1, {"loss": 1.0})
        writer.write_samples(1, [{}])
        writer.write_evaluation(1, {})
    run.truncate_after(0)
    assert not (tmp_path / "run").exists()
