"""Everything a run needs, built once from its configuration; whatever can be refused is refused here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from opd_jax.config import Config
from opd_jax.data.pipeline import Overlong, encode_examples, encode_prompts, prompt_batches, sft_batches, shares
from opd_jax.data.sources import Record, load_records
from opd_jax.data.tokenizers import (
    check_same_tokenizer,
    check_vocabulary,
    load_tokenizer,
    stop_ids,
    valid_vocab_size,
)
from opd_jax.errors import InputError
from opd_jax.evaluation.rewards import Judge
from opd_jax.mesh import Layout, make_mesh
from opd_jax.models.decoder import DecoderConfig
from opd_jax.models.hf import load_config as load_decoder_config
from opd_jax.models.hf import load_model
from opd_jax.sampling.law import Law
from opd_jax.sampling.scheduler import make_rollout
from opd_jax.training.graphs import Graphs, make_graphs
from opd_jax.training.state import TrainState, create_state
from opd_jax.types import Params, Rollouts


@dataclasses.dataclass(frozen=True)
class Network:
    """A model on the mesh: weights, shape, and where it was loaded from."""

    path: str
    params: Params
    config: DecoderConfig


@dataclasses.dataclass(frozen=True)
class Setup:
    """The parts of a run. ``batches`` is the only stateful one: its position goes into the checkpoint."""

    config: Config
    layout: Layout
    tokenizer: Any
    stops: tuple[int, ...]
    vocab_size: int
    records: list[Record]
    overlong: Overlong
    batches: Any
    student: DecoderConfig
    teacher: Network | None
    state: TrainState
    graphs: Graphs
    rollout: Callable[..., Rollouts]
    judge: Judge | None


def prepare(config: Config) -> Setup:
    """Loads and checks models, tokenizer and data, and builds the jitted functions of a run.

    Raises:
        InputError: anything in the configuration, the files it names or their combination that cannot work.
    """
    mesh = make_mesh(**config.mesh.model_dump())
    layout = Layout(mesh)
    rows, slots = config.rows, config.rollout.slots or config.rows * config.updates
    layout.check("rollout.prompts × rollout.samples / updates", (rows,), ("batch",))
    layout.check("rollout.slots", (slots,), ("batch",))
    layout.check("micro_batch", (config.micro_batch or rows,), ("batch",))
    tokenizer = load_tokenizer(config.student.path)
    vocab_size = valid_vocab_size(tokenizer)
    stops = stop_ids(config.student.path, tokenizer)
    check_positions(config, config.student.path, load_decoder_config(config.student.path))
    if config.teacher:
        _check_teacher(config, tokenizer, vocab_size)
    records, overlong, batches = _data(config, tokenizer)

    params, student = load_model(config.student.path, layout)
    check_vocabulary(config.student.path, student.vocab_size, vocab_size)
    dtype = jnp.dtype(config.dtype)
    teacher = None
    if config.teacher:
        teacher = Network(config.teacher.path, *load_model(config.teacher.path, layout, dtype))
    graphs = make_graphs(config, mesh, student, teacher and teacher.config, stops=stops, vocab_size=vocab_size)
    judge = Judge(config.reward, config.rollout.max_response) if config.reward else None
    return Setup(
        config=config,
        layout=layout,
        tokenizer=tokenizer,
        stops=stops,
        vocab_size=vocab_size,
        records=records,
        overlong=overlong,
        batches=batches,
        student=student,
        teacher=teacher,
        state=create_state(params, graphs.optimizer, graphs.shardings),
        graphs=graphs,
        rollout=make_rollout(
            graphs.engine(student), max_response=config.rollout.max_response, slots=config.rollout.slots
        ),
        judge=judge,
    )


def rollout_law(config: Config) -> Law:
    return Law(config.rollout.temperature, config.rollout.top_p, config.rollout.top_k)


def check_positions(config: Config, path: str, network: DecoderConfig) -> None:
    """Refuses a model that is not made for texts as long as those of the run.

    Raises:
        InputError: the settings that allow such texts, and the tokens that the model takes.
    """
    heldout = config.evaluation
    prompts = {"data.max_prompt": config.data.max_prompt}
    responses = {"rollout.max_response": config.rollout.max_response}
    texts = [prompts | responses]
    if heldout.data:
        own = {"evaluation.max_response": heldout.max_response} if heldout.max_response else responses
        texts.append({"evaluation.data.max_prompt": heldout.data.max_prompt} | own)
    for text in texts:
        if (total := sum(text.values())) > network.longest_text:
            raise InputError(
                f"{path}: {' + '.join(f'{name}={n}' for name, n in text.items())} = {total} tokens, but the model is "
                f"made for {network.longest_text} (max_position_embeddings in its config.json). Lower one of them by "
                f"{total - network.longest_text}, or take a model for longer texts."
            )


def _check_teacher(config: Config, tokenizer: Any, vocab_size: int) -> None:
    assert config.teacher
    check_same_tokenizer(tokenizer, load_tokenizer(config.teacher.path))
    network = load_decoder_config(config.teacher.path)
    check_vocabulary(config.teacher.path, network.vocab_size, vocab_size)
    check_positions(config, config.teacher.path, network)


def _data(config: Config, tokenizer: Any) -> tuple[list[Record], Overlong, Any]:
    judged = config.reward is not None and "answer" in config.reward.terms
    records = load_records(config.data, seed=config.seed, require_answer=judged)
    max_prompt = config.data.max_prompt
    if config.kind == "sft":
        examples, records, overlong = encode_examples(records, tokenizer, config.data, config.rollout.max_response)
        return records, overlong, sft_batches(examples, config.rows, config.seed, shares(records, config.data))
    encoded, records, overlong = encode_prompts(records, tokenizer, config.data)
    parts, samples = shares(records, config.data), config.rollout.samples
    batches = prompt_batches(encoded, config.rollout.prompts, config.seed, max_prompt, samples, parts)
    return records, overlong, batches
