"""Everything a run needs, built once from its configuration; whatever can be refused is refused here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from opd_jax import hosts
from opd_jax.config import Config
from opd_jax.data.pipeline import (
    Batches,
    Example,
    Mixed,
    Overlong,
    Tokens,
    encode_context,
    encode_examples,
    encode_prompts,
    prompt_batches,
    sft_batches,
    shares,
)
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
from opd_jax.training.score_cache import ScoreCache
from opd_jax.training.scoring import Network, Teaching, longest_context, routes, teachers_of
from opd_jax.training.state import TrainState, create_state
from opd_jax.types import Params, Rollouts


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
    teacher: Network | None  # the first of ``teaching``, which evaluations compare with
    teaching: Teaching | None
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
    fixed_rows = (config.rollout.prompts - config.sampled_prompts) * config.rollout.samples
    layout.check("rows of off_policy", (fixed_rows,), ("batch",))
    tokenizer = load_tokenizer(config.student.path)
    vocab_size = valid_vocab_size(tokenizer)
    stops = stop_ids(config.student.path, tokenizer)
    check_positions(config, config.student.path, load_decoder_config(config.student.path))
    for section in teachers_of(config):
        _check_teacher(config, section.path, tokenizer, vocab_size)
    records, overlong, batches = _data(config, tokenizer)
    judge = Judge(config.reward, config.rollout.max_response) if config.reward else None

    params, student = load_model(config.student.path, layout)
    check_vocabulary(config.student.path, student.vocab_size, vocab_size)
    dtype = jnp.dtype(config.dtype)

    def frozen(path: str) -> Network:
        return Network(*load_model(path, layout, dtype))

    teachers = tuple(frozen(section.path) for section in teachers_of(config))
    teacher = teachers[0] if teachers else None
    graphs = make_graphs(config, mesh, student, teacher and teacher.config, stops=stops, vocab_size=vocab_size)
    teaching = None
    if teachers and config.kind != "sft":
        teaching = Teaching(
            config=config,
            layout=layout,
            teachers=teachers,
            start=frozen(config.student.path) if config.objective.scale != 1 else None,
            route=routes(config, records),
            contexts=_contexts(config, records, tokenizer),
            score=graphs.scorer,
            packing=graphs.packing,
            cache=_cache(config, teachers[0]),
        )
    moving = None
    if config.teacher and config.teacher.decay is not None:
        moving = _moving(config.teacher.path, student, layout)
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
        teaching=teaching,
        state=create_state(params, graphs.optimizer, graphs.shardings, moving),
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


def _check_teacher(config: Config, path: str, tokenizer: Any, vocab_size: int) -> None:
    check_same_tokenizer(tokenizer, load_tokenizer(path))
    network = load_decoder_config(path)
    check_vocabulary(path, network.vocab_size, vocab_size)
    check_positions(config, path, network)
    if longest_context(config) + config.rollout.max_response > network.longest_text:
        raise InputError(
            f"{path}: teacher.max_context={longest_context(config)} + rollout.max_response="
            f"{config.rollout.max_response} tokens are more than the {network.longest_text} that the model is made "
            "for. Lower one of them."
        )


def _cache(config: Config, teacher: Network) -> ScoreCache | None:
    if config.teacher is None or config.teacher.cache is None:
        return None
    if hosts.several():
        raise InputError("teacher.cache: works with one process only. Remove it, or run on one host.")
    return ScoreCache(config.teacher.cache, teacher.params, teacher.config, config.dtype)


def _moving(path: str, student: DecoderConfig, layout: Layout) -> Params:
    """Float32 weights of a teacher that follows the student."""
    params, network = load_model(path, layout)
    if network != student:
        raise InputError(
            f"teacher.decay: {path} has another shape than the student, which it is to follow. Set teacher.path to "
            "student.path, or remove teacher.decay."
        )
    return params


def _contexts(config: Config, records: list[Record], tokenizer: Any) -> list[Tokens] | None:
    """Of each record the prompt of its teacher; None: that of the student."""
    sections = teachers_of(config)
    if not any(section.context for section in sections):
        return None
    found = []
    for record, i in zip(records, routes(config, records).tolist(), strict=True):
        tokens = encode_context(record, tokenizer, config.data, sections[i].context)
        if len(tokens) > longest_context(config):
            raise InputError(
                f"teacher.context: the prompt of {record.id!r} has {len(tokens)} tokens, more than teacher.max_context="
                f"{longest_context(config)}. Raise that, or shorten the template."
            )
        found.append(tokens)
    return found


def _data(config: Config, tokenizer: Any) -> tuple[list[Record], Overlong, Any]:
    judged = config.reward is not None and "answer" in config.reward.terms
    records = load_records(config.data, seed=config.seed, require_answer=judged)
    max_prompt = config.data.max_prompt
    if config.kind == "sft":
        examples, records, overlong = encode_examples(records, tokenizer, config.data, config.rollout.max_response)
        return records, overlong, sft_batches(examples, config.rows, config.seed, shares(records, config.data))
    encoded, records, overlong = encode_prompts(records, tokenizer, config.data)
    parts, samples = shares(records, config.data), config.rollout.samples
    batches = None
    if config.sampled_prompts:
        batches = prompt_batches(encoded, config.sampled_prompts, config.seed, max_prompt, samples, parts)
    if config.off_policy:
        batches = Mixed(batches, _texts(config, tokenizer))
    return records, overlong, batches


def _texts(config: Config, tokenizer: Any) -> Batches[list[Example]]:
    assert config.off_policy
    data = config.off_policy.data or config.data
    # rows have no room for longer ones
    data = data.model_copy(update={"max_prompt": min(data.max_prompt, config.data.max_prompt)})
    records = load_records(data, seed=config.seed)
    examples, records, _ = encode_examples(records, tokenizer, data, config.rollout.max_response)
    rows = (config.rollout.prompts - config.sampled_prompts) * config.rollout.samples
    return sft_batches(examples, rows, config.seed + 1, shares(records, data))
