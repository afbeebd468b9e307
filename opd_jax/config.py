"""Typed, frozen configuration. Every leaf has a reason to be here; ``config_files`` reads and writes it."""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal, Self, TypeVar

import pydantic
from pydantic import Field, field_validator, model_validator

PositiveInt = Annotated[int, Field(ge=1, lt=2**31 - 1)]  # steps are counted in int32
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**31 - 1)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
StepRange = Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]


class Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


_M = TypeVar("_M", bound=Strict)


class Objective(Strict):
    """What is minimised at each response position (paper.md's objectives; ``opd_jax.losses`` computes it).

    name: ``sampled`` score-function policy gradient of the reverse KL (Eq. 3); ``full`` divergence over the vocabulary
    (Eq. 4); ``topk`` divergence over a support of k ids (Eq. 5); ``topk_reference`` the top-k objective of the paper's
    published code: detached full-vocabulary log-ratios, weighted by the student's probability on the support.
    """

    name: Literal["sampled", "full", "topk", "topk_reference"] = "full"
    k: PositiveInt = 16
    support: Literal["student", "teacher", "overlap", "non_overlap", "union"] = "student"
    divergence: Literal["reverse", "forward", "jsd", "skew"] = "reverse"
    beta: Annotated[float, Field(ge=0, le=1)] = 0.5  # jsd: weight of the teacher in the mixture
    alpha: Fraction = 0.5  # skew: weight of the teacher in the mixture
    normalise: bool = True  # topk: renormalise both sides over the support
    tail: bool = False  # topk: one extra outcome holds what lies outside the support
    temperature: Annotated[float, Field(gt=0)] = 1.0  # divides the logits of both sides
    weight: Annotated[float, Field(gt=0)] = 1.0  # of the divergence, next to a reward
    scale: Annotated[float, Field(gt=0)] = 1.0  # λ of the target ∝ teacher^λ · start^(1−λ); beyond 1: extrapolation
    correction: Literal["none", "importance", "ppo", "tis", "icepop"] = "none"  # of rollouts by an older policy
    ratio_low: Annotated[float, Field(ge=0, le=1)] | None = None  # None: ppo 0.8, icepop 0.5
    ratio_high: Annotated[float, Field(ge=1)] | None = None  # None: ppo 1.2, tis 2, icepop 5

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.tail and not self.normalise:
            raise ValueError("tail=true already closes the distribution; it cannot be combined with normalise=false")
        if self.name in ("sampled", "topk_reference") and (self.tail or self.divergence != "reverse"):
            raise ValueError(f"name={self.name} is a reverse-KL gradient; it takes neither divergence nor tail")
        unused = {"none": ("ratio_low", "ratio_high"), "importance": ("ratio_low", "ratio_high"), "tis": ("ratio_low",)}
        for name in unused.get(self.correction, ()):
            if getattr(self, name) is not None:
                raise ValueError(f"correction={self.correction} has no {name}; remove it")
        return self

    @property
    def ratio_bounds(self) -> tuple[float, float]:
        """Bounds of the ratio p(y)/μ(y): outside of them PPO clips it, TIS caps it, IcePop drops the token."""
        low, high = {"ppo": (0.8, 1.2), "tis": (0.0, 2.0), "icepop": (0.5, 5.0)}.get(self.correction, (0.0, math.inf))
        return (low if self.ratio_low is None else self.ratio_low, high if self.ratio_high is None else self.ratio_high)


class Model(Strict):
    path: str  # a Hugging Face directory: config.json, *.safetensors, tokenizer


class Teacher(Model):
    """A frozen teacher, or, with ``decay``, the student's own past: weights ← decay · weights + (1 − decay) · student
    after every ``every``-th update (an exponential mean; decay 0 copies the student)."""

    sources: list[str] = []  # data sources whose prompts it teaches; empty: all that no other teacher names
    weight: Annotated[float, Field(gt=0)] = 1.0  # of its prompts' tokens in the loss
    # privileged context: the template of the teacher's own prompt, with {problem} and {answer} or {response}
    context: str | None = None
    max_context: PositiveInt | None = None  # tokens of that prompt; None: twice data.max_prompt
    decay: Annotated[float, Field(ge=0, le=1)] | None = None
    every: PositiveInt = 1  # updates
    cache: str | None = None  # directory that keeps its scores of off_policy responses

    @field_validator("context")
    @classmethod
    def _known_names(cls, context: str | None) -> str | None:
        names = ("problem", "answer", "response")
        unknown = [n for n in re.findall(r"(?<![\w^}])\{([a-z_]{3,})\}", context or "") if n not in names]
        if unknown or "{problem}" not in (context or "{problem}"):
            what = f"{{{unknown[0]}}} is unknown" if unknown else "it does not hold {problem}"
            raise ValueError(f"{what}; a context holds {{problem}}, and {{answer}} or {{response}}")
        return context


class Reward(Strict):
    """A reward of whole responses: Σ weight · term, compared within the samples of a prompt (GRPO, paper A.1).

    Terms: ``answer`` 1 if right; ``format`` 1 if an answer stands in a box or behind "Answer:"; ``length`` from 0 to −1
    over the last ``buffer`` tokens before the limit; ``module:function`` a Python function of one's own, called as
    f(problem=, answer=, response=, tokens=, stopped=) in a process of its own.
    """

    terms: Annotated[dict[str, float], Field(min_length=1)] = {"answer": 1.0}
    weight: Annotated[float, Field(gt=0)] = 1.0  # of its policy gradient, next to the teacher's objective
    advantage: Literal["standardised", "centred"] = "standardised"
    buffer: PositiveInt = 1024  # tokens
    fallback_number: bool = False  # an answer may be the last number of the response
    limit: Annotated[float, Field(gt=0)] = 10.0  # seconds for one call of a function of one's own
    skip_bad: bool = False  # leave out responses on which that function fails, instead of ending the run


class Part(Strict):
    """One source of ``data.mix``. What is left out is as in the section ``data``."""

    source: str
    weight: Annotated[float, Field(gt=0)] = 1.0  # share of the prompts served, relative to the other parts
    subset: str | None = None
    split: str | None = None
    problem: str | None = None
    answer: str | None = None
    response: str | None = None
    template: str | None = None
    limit: PositiveInt | None = None


class Data(Strict):
    """Where prompts come from: one ``source`` or a ``mix`` of several by name.

    A source is a .jsonl or .parquet path, ``task:NAME``, or a Hugging Face dataset id.
    """

    source: str | None = None
    mix: dict[Annotated[str, Field(pattern=r"^[\w-]+$")], Part] | None = None
    subset: str | None = None  # Hugging Face configuration name
    split: str = "train"
    problem: str | None = None  # column; None: the first of problem, question, prompt
    answer: str | None = None  # column; None: the first of answer, solution, target if present
    response: str | None = None  # column with the text to imitate (sft only)
    template: str = "plain"  # plain | boxed | dapo | text holding {problem}
    chat: bool = True  # wrap in the tokenizer's chat template
    chat_arguments: dict[str, pydantic.JsonValue] = {}  # e.g. enable_thinking: false
    max_prompt: PositiveInt = 1024  # tokens
    overlong: Literal["drop", "truncate"] = "drop"  # a prompt longer than that; truncate: keep its last tokens
    limit: PositiveInt | None = None  # use the first n rows of each source only
    skip_bad: bool = False  # leave out rows that cannot be used, and count them, rather than stop

    @model_validator(mode="after")
    def _one_or_several(self) -> Self:
        if (self.source is None) == (not self.mix):
            raise ValueError("give either source (one) or mix (several, as mix: {name: {source: …, weight: 0.3}})")
        return self

    @property
    def parts(self) -> dict[str, Data]:
        """One section for each source, by its name in ``mix``; a single source has the name ""."""
        if not self.mix:
            return {"": self}
        return {
            name: self.model_copy(update={"mix": None} | part.model_dump(exclude_none=True, exclude={"weight"}))
            for name, part in self.mix.items()
        }

    @property
    def title(self) -> str:
        """For messages."""
        return self.source or " + ".join(self.mix or ())


class OffPolicy(Strict):
    """Part of every batch that is not sampled: responses of a corpus, or of the teacher (``opd generate``)."""

    fraction: Fraction  # of the rows of a batch (GKD's 1 − λ)
    data: Data | None = None  # with a response column; None: the run's own data


class Length(Strict):
    """A number of tokens that goes linearly from ``start`` at step 1 to ``end`` at step ``steps``, and stays."""

    start: PositiveInt
    end: PositiveInt | None = None  # None: rollout.max_response
    steps: PositiveInt

    def at(self, step: int, longest: int) -> int:
        """Tokens at a step (counted from 1), at most ``longest``."""
        end = longest if self.end is None else self.end
        done = min((step - 1) / max(self.steps - 1, 1), 1.0)
        return min(round(self.start + (end - self.start) * done), longest)


class Rollout(Strict):
    prompts: PositiveInt = 64  # per step
    samples: PositiveInt = 4  # responses per prompt
    max_response: PositiveInt = 7168  # tokens
    length: Length | None = None  # of the longest response, as a schedule below max_response; None: max_response
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Fraction = 1.0
    top_k: NonNegativeInt = 0  # 0: off
    slots: PositiveInt | None = None  # rows decoded together; fewer than prompts × samples: refilled as they finish


class Positions(Strict):
    """Weights of response positions t = 0, 1, …: discount^t where skip ≤ t < horizon, else 0. Metrics see them all."""

    horizon: Length | None = None  # None: the whole response
    discount: Fraction = 1.0
    skip: NonNegativeInt = 0  # tokens


class Optimizer(Strict):
    lr: Annotated[float, Field(gt=0)] = 1e-6
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "constant"
    warmup: NonNegativeInt = 0  # steps
    decay: NonNegativeInt = 0  # wsd: the last steps, over which the rate falls to 0
    b1: Decay = 0.9
    b2: Decay = 0.999
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip: Annotated[float, Field(gt=0)] = 1.0  # global gradient norm
    moment_dtype: Literal["float32", "bfloat16"] = "float32"  # of the first moment; the second is always float32

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.schedule == "wsd") != (self.decay > 0):
            raise ValueError(
                f"schedule={self.schedule} with decay={self.decay}: wsd, and only that, takes the number of the "
                "last steps, over which the rate falls"
            )
        return self


class MeshSizes(Strict):
    data: int = -1
    fsdp: int = 1
    tensor: int = 1


class Evaluation(Strict):
    """Held-out prompts: accuracy where they have answers, divergence from the teacher on fresh student rollouts."""

    data: Data | None = None
    every: NonNegativeInt = 0  # steps; 0: only before and after the run
    problems: PositiveInt = 64
    samples: PositiveInt = 1  # k of avg@k
    batch: PositiveInt = 64  # rows decoded together
    max_response: PositiveInt | None = None  # None: as in training
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Fraction = 1.0
    fallback_number: bool = False  # an answer may be the last number of the response


class Checkpoint(Strict):
    every: PositiveInt = 50  # steps; the last step is always saved
    keep: PositiveInt = 2  # the last ones
    # Keeps the best, too: every evaluated step is then saved. Least of the KLs, most of the others.
    best: Literal["accuracy", "reverse_kl", "forward_kl", "forward_kl_teacher_rollouts", "overlap_ratio"] | None = None
    export_best: bool = False  # each new best also goes to run_dir/best, as a Hugging Face directory
    push: str | None = None  # … and from there into this repository of the Hub, USER/NAME; a new one is private

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.export_best and self.best is None:
            raise ValueError("export_best=true needs best, the metric by which a checkpoint is the best")
        if self.push is not None and not self.export_best:
            raise ValueError(f"push={self.push} uploads what export_best writes; set export_best=true and best")
        return self


class Config(Strict):
    """One run. ``kind`` opd: rollouts scored by the teacher (and by a reward, if there is one); sft: imitation of the
    ``data.response`` column; grpo: rollouts scored by a reward (and held near the teacher, if there is one)."""

    kind: Literal["opd", "sft", "grpo"] = "opd"
    run_dir: str
    seed: NonNegativeInt = 0
    steps: PositiveInt
    student: Model
    teacher: Teacher | None = None
    more_teachers: list[Teacher] = []
    reward: Reward | None = None
    off_policy: OffPolicy | None = None
    objective: Objective = Objective()
    data: Data
    rollout: Rollout = Rollout()
    positions: Positions = Positions()
    optimizer: Optimizer = Optimizer()
    mesh: MeshSizes = MeshSizes()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # compute; master weights are always float32
    pack: bool = True  # several sequences a row, rather than one padded to the longest possible
    micro_batch: PositiveInt | None = None  # rows per pass; None: an eighth of them if packed, else all at once
    updates: PositiveInt = 1  # optimizer steps on each batch of rollouts, each on its own part of the rows
    max_skipped: PositiveInt = 5  # steps in a row whose loss or gradient is not finite, until the run ends
    alarm: Literal["off", "warn", "stop"] = "warn"  # what a collapse does, see training/alarm.py
    remat: Literal["none", "dots", "full", "offload"] = "full"  # what the backward pass recomputes, see models.forward
    metrics_every: PositiveInt = 1  # opd: steps from one measurement of overlap, entropies, KLs to the next
    metrics_k: PositiveInt | None = None  # ids in each list of the overlap metrics; None: objective.k
    log_samples: NonNegativeInt = 2  # rollouts written as text at every step that is evaluated
    profile: StepRange | None = None  # first and last step of a jax.profiler trace
    wandb: str | None = None  # project at Weights & Biases that gets the numbers, too

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.kind == "opd" and self.teacher is None:
            raise ValueError("kind=opd needs teacher.path (a Hugging Face directory); for imitation set kind=sft")
        if self.profile and not self.profile[0] <= self.profile[1] <= self.steps:
            raise ValueError(f"profile={self.profile}: expected [first, last] with first ≤ last ≤ steps = {self.steps}")
        if self.kind == "sft" and self.data.response is None:
            raise ValueError("kind=sft needs data.response, the column with the text to imitate")
        if self.kind == "sft" and self.positions != Positions():
            raise ValueError("kind=sft takes no positions: all tokens of a response weigh the same; leave it out")
        if self.kind == "sft":
            for name in ("reward", "off_policy"):
                if getattr(self, name) is not None:
                    raise ValueError(f"kind=sft takes no {name}: it imitates data.response; remove it")
        if self.kind == "grpo" and self.reward is None:
            raise ValueError("kind=grpo needs a reward; set reward.terms={answer: 1.0}")
        if self.reward and self.rollout.samples < 2:
            raise ValueError(
                f"reward with rollout.samples={self.rollout.samples}: a response is compared with the others of its "
                "prompt; set rollout.samples to 2 or more"
            )
        _check_teachers(self)
        policy_gradient = self.objective.name == "sampled" or self.reward
        if self.kind != "sft" and self.objective.correction != "none" and not policy_gradient:
            raise ValueError(
                f"objective.correction={self.objective.correction} weights a policy gradient, which objective.name="
                f"{self.objective.name} has none of; set objective.name=sampled, a reward, or objective.correction=none"
            )
        if self.checkpoint.best and not (self.evaluation.data and self.evaluation.every):
            raise ValueError(
                f"checkpoint.best={self.checkpoint.best} compares evaluations; set evaluation.data and evaluation.every"
            )
        if self.checkpoint.best not in (None, "accuracy") and self.teacher is None:
            raise ValueError(
                f"checkpoint.best={self.checkpoint.best} compares with a teacher, which kind=sft does not measure; set "
                "checkpoint.best=accuracy"
            )
        if self.updates > 1 and (self.kind == "sft" or self._uncorrected()):
            raise ValueError(
                f"updates={self.updates} with kind={self.kind}, objective.name={self.objective.name}, "
                f"objective.correction={self.objective.correction}: several updates need rollouts (kind=opd), and a "
                "policy gradient a correction for those of an older policy; set objective.correction=tis, or updates=1"
            )
        rows = self.rollout.prompts * self.rollout.samples // self.updates
        if self.rollout.prompts * self.rollout.samples % self.updates:
            raise ValueError(
                f"updates={self.updates} does not divide rollout.prompts × rollout.samples = "
                f"{self.rollout.prompts * self.rollout.samples}"
            )
        if self.micro_batch is not None and rows % self.micro_batch:
            raise ValueError(
                f"micro_batch={self.micro_batch} does not divide rollout.prompts × rollout.samples / updates = {rows}"
            )
        return self

    @model_validator(mode="after")
    def _lengths_fit(self) -> Self:
        longest, positions = self.rollout.max_response, self.positions
        for name, length in (("rollout.length", self.rollout.length), ("positions.horizon", positions.horizon)):
            for end in ("start", "end"):
                if length and (getattr(length, end) or 0) > longest:
                    raise ValueError(
                        f"{name}.{end}={getattr(length, end)} is beyond rollout.max_response={longest}; lower it, or "
                        "raise rollout.max_response"
                    )
        horizon = positions.horizon
        trained = min(horizon.start, horizon.end or longest) if horizon else longest
        if positions.skip >= trained:
            raise ValueError(
                f"positions.skip={positions.skip} leaves nothing to train of the first {trained} tokens of a response "
                "(positions.horizon, rollout.max_response); lower it"
            )
        return self

    def _uncorrected(self) -> bool:
        policy_gradient = self.objective.name == "sampled" or self.reward is not None
        return policy_gradient and self.objective.correction == "none"

    @property
    def overlap_k(self) -> int:
        """Ids in each list of the overlap metrics, in training and evaluation."""
        return self.metrics_k or self.objective.k

    @property
    def sampled_prompts(self) -> int:
        """Prompts of a batch that are sampled from; the responses of the others are a corpus's (``off_policy``)."""
        return round(self.rollout.prompts * (1 - (self.off_policy.fraction if self.off_policy else 0)))

    @property
    def rows(self) -> int:
        """Sequences of one update."""
        return self.rollout.prompts * self.rollout.samples // self.updates


def _check_teachers(run: Config) -> None:
    if run.teacher is None:
        for name, there in {
            "more_teachers": run.more_teachers,
            "off_policy": run.off_policy and run.kind != "sft",
            "objective.scale": run.objective.scale != 1,
        }.items():
            if there:
                raise ValueError(f"{name} needs a teacher; set teacher.path, or remove it")
        return
    further = run.more_teachers or run.objective.scale != 1 or run.teacher != Teacher(path=run.teacher.path)
    if run.kind == "sft" and further:
        raise ValueError(
            "kind=sft only compares with a teacher: it takes teacher.path alone; remove the other settings of "
            "teacher, more_teachers and objective.scale"
        )
    named = [source for t in (run.teacher, *run.more_teachers) for source in t.sources]
    for source in named:
        if source not in (run.data.mix or {}):
            known = ", ".join(run.data.mix or ()) or "none: data has no mix"
            raise ValueError(f"teacher.sources: '{source}' is no name of data.mix ({known})")
        if named.count(source) > 1:
            raise ValueError(f"teacher.sources: '{source}' has two teachers; leave it to one")
    for t in run.more_teachers:
        if not t.sources:
            raise ValueError(f"more_teachers: {t.path} needs sources, the names of data.mix that it teaches")
        if t.decay is not None or t.cache is not None:
            raise ValueError("more_teachers: decay and cache are for teacher alone; remove them there")
    if run.teacher.sources and not (set(run.data.mix or ()) <= set(named)):
        raise ValueError(
            f"teacher.sources: nobody teaches {', '.join(sorted(set(run.data.mix or ()) - set(named)))}; leave "
            "teacher.sources empty to have it teach what no other teacher names"
        )
    alone = not (run.more_teachers or run.objective.scale != 1 or run.teacher.context)
    if run.teacher.cache and (run.teacher.decay is not None or not run.off_policy or not alone):
        raise ValueError(
            "teacher.cache keeps a fixed teacher's scores of off_policy responses; it takes neither decay, "
            "more_teachers, context nor objective.scale, and needs off_policy"
        )
    if run.off_policy is None:
        return
    if run.kind != "opd" or run.reward or run.objective.name not in ("full", "topk"):
        raise ValueError(
            f"off_policy with kind={run.kind}, objective.name={run.objective.name}"
            f"{' and a reward' if run.reward else ''}: responses of a corpus have no sampling policy; set "
            "kind=opd, objective.name=full or topk, and no reward"
        )
    if run.more_teachers or run.teacher.context:
        raise ValueError("off_policy: takes one teacher without context; remove more_teachers and teacher.context")
    exact = run.rollout.prompts * (1 - run.off_policy.fraction)
    if abs(exact - round(exact)) > 1e-6:
        raise ValueError(
            f"off_policy.fraction={run.off_policy.fraction} of rollout.prompts={run.rollout.prompts} is no whole "
            "number of prompts; change one of them"
        )
    if (run.off_policy.data or run.data).response is None:
        raise ValueError("off_policy needs a column with responses; set off_policy.data.response (or data.response)")
