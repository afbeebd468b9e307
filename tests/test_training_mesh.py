"""One run on several meshes of eight CPU devices and on one device: losses, gradients, checkpoints, refusals."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from tiny_runs import VOCAB, distance

from opd_jax.checkpoints.state import Checkpoints, abstract
from opd_jax.errors import InputError
from opd_jax.mesh import Layout, batch_shards, make_mesh
from opd_jax.models.decoder import parameter_shardings
from opd_jax.objectives.opd import opd_loss
from opd_jax.training import setup as training_setup
from opd_jax.training.graphs import rows_per_pass
from opd_jax.training.setup import Setup, prepare, rollout_law
from opd_jax.training.step import global_gradient
from opd_jax.types import Scores

STEPS = 3
MESHES = [(1, 8, 1), (8, 1, 1), (2, 2, 2), (1, 1, 8)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.write_models(tmp_path_factory.mktemp("models"))


def setup_on(models: Path, sizes: tuple[int, int, int], **settings: Any) -> Setup:
    """``prepare`` as a run calls it; where the sizes fill one device, on the first of the eight."""
    # Adam turns the rounding of a gradient near 0 into a step of ±lr, so a high rate would compare rounding
    config = tiny_runs.run_config(models, models / "unused", optimizer={"lr": 3e-4}, **settings)
    config = config.model_copy(
        update={"mesh": config.mesh.model_copy(update=dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))}
    )
    devices = jax.devices()[: int(np.prod(sizes))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_setup, "make_mesh", functools.partial(make_mesh, devices=devices))
        return prepare(config)


@pytest.fixture(scope="module")
def rollouts(models: Path) -> list[Any]:
    """What the untrained student samples on one device at steps 1, 2, 3: the same input for every mesh."""
    setup = setup_on(models, (1, 1, 1))
    law = rollout_law(setup.config)
    prompts = [setup.layout.put_rows(next(setup.batches)) for _ in range(STEPS)]
    return [
        jax.device_get(setup.rollout(setup.graphs.engine(setup.student).cast(setup.state.params), p, law, 0, i + 1))
        for i, p in enumerate(prompts)
    ]


def steps_on(setup: Setup, rollouts: list[Any]) -> tuple[list[Any], list[float], list[float], Any]:
    """(gradients, losses, gradient norms, final parameters) of the first steps, through the jitted parts of a run."""
    gradient = jax.jit(
        lambda params, rows, hidden, frozen: global_gradient(
            functools.partial(_loss, setup),
            params,
            rows,
            hidden,
            frozen=frozen,
            layout=setup.layout,
            micro_batch=rows_per_pass(setup.config, batch_shards(setup.layout)),
        )
    )
    assert setup.graphs.score
    assert setup.teacher
    grads, losses, norms, state = [], [], [], setup.state
    for batch in rollouts:
        batch = setup.layout.put_rows(setup.graphs.pack(batch))
        scores = setup.graphs.score(setup.teacher.params, batch)
        grad, loss, _ = gradient(state.params, batch, scores.hidden, scores.head)
        state, metrics = setup.graphs.update(state, batch, scores.hidden, frozen=scores.head)
        np.testing.assert_allclose(metrics["loss"][0], loss, rtol=1e-5)
        grads.append(jax.device_get(grad))
        losses.append(float(loss))
        norms.append(float(metrics["gradient_norm"][0]))
    assert int(state.skipped) == 0
    assert setup.graphs.update._cache_size() == 1
    return grads, losses, norms, state.params


def _loss(setup: Setup, params: Any, rows: Any, hidden: Any, teacher_head: Any) -> Any:
    return opd_loss(
        params, rows, Scores(hidden, teacher_head), config=setup.student, objective=setup.config.objective,
        vocab_size=setup.vocab_size, dtype=jnp.dtype(setup.config.dtype), layout=setup.layout,
    )  # fmt: skip


@pytest.fixture(scope="module")
def on_one_device(models: Path, rollouts: list[Any]) -> Any:
    setup = setup_on(models, (1, 1, 1))
    assert setup.layout.mesh.size == 1
    grads, losses, norms, params = steps_on(setup, rollouts)
    return grads, losses, norms, jax.device_get(params)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_the_first_steps_do_not_depend_on_the_mesh(
    models: Path, rollouts: list[Any], on_one_device: Any, sizes: tuple[int, int, int]
) -> None:
    """OPD with a wider teacher of another family: losses and gradients of three steps to 1e-5."""
    setup = setup_on(models, sizes)
    assert setup.vocab_size == VOCAB
    widest = max(jax.tree.leaves(setup.state.params), key=lambda x: x.size)
    assert widest.addressable_shards[0].data.size == widest.size // (sizes[1] * sizes[2])
    grads, losses, norms, params = steps_on(setup, rollouts)
    want_grads, want_losses, want_norms, want_params = on_one_device
    np.testing.assert_allclose(losses, want_losses, rtol=1e-5)
    np.testing.assert_allclose(norms, want_norms, rtol=1e-5)
    for got, want in zip(grads, want_grads, strict=True):
        assert distance(got, want) < 1e-5
    assert len(set(losses)) == STEPS
    for name, (got, want) in {"params": (params, want_params)}.items():
        assert distance(got, want) < 1e-4, name  # Adam turns rounding of gradients near 0 into steps of ±lr
    assert all(
        a.sharding == b
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(setup.graphs.shardings.params), strict=True)
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_the_first_step_in_bfloat16(tmp_path: Path, rollouts: list[Any], sizes: tuple[int, int, int]) -> None:
    """bfloat16 rounds otherwise on a mesh. Weights of ordinary size: with twice that, gradients of one device are 9 %
    from those in float32 already."""
    models = tiny_runs.write_models(tmp_path, spread=1.0)
    want_grads, want_losses, _, _ = steps_on(setup_on(models, (1, 1, 1), dtype="bfloat16"), rollouts[:1])
    grads, losses, _, _ = steps_on(setup_on(models, sizes, dtype="bfloat16"), rollouts[:1])
    np.testing.assert_allclose(losses[0], want_losses[0], rtol=2e-2)
    assert distance(grads[0], want_grads[0]) < 2e-2


@pytest.mark.exhaustive
def test_micro_batches_on_a_mesh(models: Path, rollouts: list[Any], on_one_device: Any) -> None:
    setup = setup_on(models, (2, 2, 2), micro_batch=4)
    grads, losses, _, _ = steps_on(setup, rollouts[:1])
    np.testing.assert_allclose(losses[0], on_one_device[1][0], rtol=1e-5)
    assert distance(grads[0], on_one_device[0][0]) < 1e-5


@pytest.mark.exhaustive
def test_a_checkpoint_moves_to_another_mesh(models: Path, rollouts: list[Any], tmp_path: Path) -> None:
    """Saved on (4, 2, 1) after an update, restored on (2, 2, 2) and on one device: every array bit by bit."""
    saved = setup_on(models, (4, 2, 1))
    assert saved.graphs.score
    assert saved.teacher
    batch = saved.layout.put_rows(saved.graphs.pack(rollouts[0]))
    scores = saved.graphs.score(saved.teacher.params, batch)
    state, _ = saved.graphs.update(saved.state, batch, scores.hidden, frozen=scores.head)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, state, {"data": saved.batches.get_state()})
    checkpoints.close()
    want = jax.device_get(state)
    for sizes in ((2, 2, 2), (1, 1, 1)):
        other = setup_on(models, sizes)
        found = Checkpoints(tmp_path, keep=1).restore(abstract(other.state, other.graphs.shardings))
        assert found is not None
        got, position = found
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), want)
        pairs = zip(jax.tree.leaves(got), jax.tree.leaves(other.graphs.shardings), strict=True)
        assert all(x.sharding == s for x, s in pairs)
        other.batches.set_state(position["data"])
        jax.tree.map(np.testing.assert_array_equal, next(other.batches), next(saved.batches))
        saved.batches.set_state(position["data"])


def test_a_mesh_that_does_not_fit_is_refused(models: Path) -> None:
    with pytest.raises(InputError, match="does not fill 8 devices"):
        prepare(tiny_runs.run_config(models, models / "unused", mesh={"data": 3}))
    rollout = {"prompts": 3, "samples": 2, "max_response": 10}
    with pytest.raises(InputError, match=r"rollout.prompts × rollout.samples.*has size 6.*divide.*= 8"):
        prepare(tiny_runs.run_config(models, models / "unused", rollout=rollout))
    with pytest.raises(InputError, match=r"micro_batch.*has size 4.*divide.*= 8"):
        prepare(tiny_runs.run_config(models, models / "unused", micro_batch=4))
    few_heads = dataclasses.replace(tiny_runs.STUDENT, kv_heads=2)
    with pytest.raises(InputError, match=r"layers.k: axis 'kv_heads' has size 2.*mesh.tensor = 8"):
        parameter_shardings(few_heads, Layout(make_mesh(1, 1, 8)))
