"""Rollouts by continuous batching: the host fills free slots from the queue of prompts between segments of decoding.

Every process of a multi-host run takes the same decisions, from replicated flags and the same list of requests; it
reads only the responses of its own slots.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import hosts
from opd_jax.errors import InputError
from opd_jax.mesh import batch_shards, shard_holders
from opd_jax.sampling.decode import SEGMENT, Emitted, Engine, Slots, bucket
from opd_jax.sampling.law import Law
from opd_jax.types import Params, Prompts, Rollouts


class Request(NamedTuple):
    """One response to make; ``id`` and ``sample`` seed its random numbers. Equal neighbours are prefilled once."""

    tokens: Sequence[int]
    id: int
    sample: int


class Response(NamedTuple):
    """A finished response: arrays over its tokens, end-of-sequence included; of a slot that only other processes hold,
    arrays of no tokens."""

    tokens: np.ndarray
    logp: np.ndarray
    entropy: np.ndarray
    topk_ids: np.ndarray
    topk_logp: np.ndarray
    stopped: bool  # by an end-of-sequence id; False: cut at the length limit
    length: int  # tokens, known on every process


@dataclasses.dataclass
class Occupancy:
    """Slot-steps that made a token, and all slot-steps, while prompts were waiting and in all; responses ended."""

    busy_waiting: int = 0
    all_waiting: int = 0
    busy: int = 0
    all: int = 0
    finished: int = 0

    def add(self, busy: int, everything: int, waiting: bool, ended: int) -> None:
        self.busy += busy
        self.all += everything
        self.finished += ended
        if waiting:
            self.busy_waiting += busy
            self.all_waiting += everything


def generate(
    engine: Engine,
    weights: Params,
    requests: Sequence[Request],
    law: Law,
    seed: int,
    step: int,
    *,
    slots: int,
    max_response: int,
    limit: int | None = None,
    width: int | None = None,
    occupancy: Occupancy | None = None,
) -> Iterator[tuple[int, Response]]:
    """Yields (index of the request, response) as they finish; ``weights`` are ``engine.cast(params)``.

    What is sampled depends on (seed, step, id, sample, position) alone, not on slots, order or neighbours.

    Args:
        max_response: tokens that a slot must have room for; longer responses are cut.
        limit: cuts them earlier, without compiling anything.
        width: cache columns for prompts, where others than these are to run in the same compiled functions; None: as
            many as the longest has tokens.

    Raises:
        InputError: no slots, more shards than slots, or an empty prompt.
    """
    shards = batch_shards(engine.layout)
    if slots < 1 or slots % shards:
        raise InputError(
            f"slots = {slots}: must be a positive multiple of the {shards} batch shards (mesh.data × mesh.fsdp)."
        )
    for request in requests:
        if not len(request.tokens):
            raise InputError(f"prompt {request.id}: has no tokens. Leave it out, or give a template that adds some.")
    if not requests:
        return
    limit = min(limit or max_response, max_response)
    width = width or max(len(r.tokens) for r in requests)
    host = _Host(engine, requests, slots, shards, max_response, limit, width)
    state = host.start()
    while True:
        state = host.fill(state, weights, seed, step)
        if not host.live.any():
            return
        steps, waiting = host.steps(), host.waiting()
        state = host.make_room(state, steps)
        patience = max(1, len(host.owner) // 8) if waiting else len(host.owner) + 1
        state, emitted, flags = engine.segment(weights, state, law, limit, steps, patience)
        flags = jax.device_get(flags)
        if occupancy:
            ended = int((host.live & ~flags.live).sum())
            occupancy.add(int(flags.count.sum()), int(flags.steps) * len(host.owner), waiting, ended)
        yield from host.collect(emitted, flags)


class _Host:
    """What the host knows: who owns which slot, where each started, and the tokens that it has fetched."""

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[Request],
        slots: int,
        shards: int,
        max_response: int,
        limit: int,
        width: int,
    ):
        self.engine, self.requests, self.shards = engine, requests, shards
        self.max_response, self.limit, self.width = max_response, limit, width
        # Shards that the same processes hold share a queue, so that rows end where their prompts came from.
        holders = shard_holders(engine.layout)
        queues: dict[frozenset[int], deque[int]] = {held: deque() for held in holders}
        self.queues = [queues[held] for held in holders]
        for i in range(len(requests)):
            self.queues[i * shards // len(requests)].append(i)
        self.owner = np.full(slots, -1)
        self.live = np.zeros(slots, bool)
        self.position = np.zeros(slots, int)
        self.first = np.zeros(slots, int)  # cache column of the first prompt token
        self.column = self.width
        self.columns = self._columns(self.width + min(SEGMENT, max_response))
        self.parts: dict[int, list[Emitted]] = {}

    def start(self) -> Slots:
        state: Any = self.engine.empty(len(self.owner), self.columns)
        return state.replace(column=jnp.int32(self.column))

    def waiting(self) -> bool:
        return any(self.queues)

    def fill(self, state: Slots, weights: Params, seed: int, step: int) -> Slots:
        """Puts waiting requests into free slots: one prefill for each different prompt of a shard."""
        per_shard = len(self.owner) // self.shards
        prompts: list[list[int]] = [[] for _ in range(self.shards)]  # request indices to prefill
        source = np.full(len(self.owner), -1, np.int32)
        for slot in np.flatnonzero(~self.live).tolist():
            shard = slot // per_shard
            queue, mine = self.queues[shard], prompts[shard]
            if queue:
                index = queue.popleft()
                if not mine or not self._same(mine[-1], index):
                    mine.append(index)
                source[slot] = len(mine) - 1
                self._enter(slot, index)
        return self._prefill(state, weights, prompts, source, seed, step) if any(prompts) else state

    def _same(self, a: int, b: int) -> bool:
        return self.requests[a].id == self.requests[b].id and self.requests[a].tokens == self.requests[b].tokens

    def _enter(self, slot: int, index: int) -> None:
        self.owner[slot], self.live[slot], self.position[slot] = index, True, 0
        self.first[slot] = self.column - len(self.requests[index].tokens)
        self.parts[index] = []

    def _prefill(
        self, state: Slots, weights: Params, prompts: list[list[int]], source: np.ndarray, seed: int, step: int
    ) -> Slots:
        # powers of four, so that few shapes compile
        most = max(map(len, prompts))
        rows = min(next(4**i for i in range(20) if 4**i >= most), len(self.owner) // self.shards)
        longest = max(len(self.requests[i].tokens) for mine in prompts for i in mine)
        width = min(bucket(longest, 16), self.width)
        tokens = np.zeros((self.shards, rows, width), np.int32)
        lengths = np.ones((self.shards, rows), np.int32)
        for shard, mine in enumerate(prompts):
            for row, index in enumerate(mine):
                text = self.requests[index].tokens
                tokens[shard, row, width - len(text) :] = text
                lengths[shard, row] = len(text)
        tokens, lengths = tokens.reshape(-1, width), lengths.reshape(-1)
        hidden, cache = self.engine.prefill(weights, tokens, lengths)
        owners = [self.requests[max(i, 0)] for i in self.owner]
        ids, samples = (np.asarray([getattr(r, n) for r in owners], np.uint32) for n in ("id", "sample"))
        return self.engine.place(state, hidden, cache, lengths, source, (seed, step, ids, samples))

    def steps(self) -> int:
        """Tokens that the next segment may make: no slot needs more."""
        return min(SEGMENT, int((self.limit - self.position[self.live]).max()))

    def make_room(self, state: Slots, steps: int) -> Slots:
        """Moves the live part of the cache to the left, and into wider or narrower arrays, as the segment needs."""
        # A prompt as long as the longest must find its columns before the shared one.
        shift = min(int(self.first[self.live].min()), self.column - self.width)
        fitting = self._columns(self.column - shift + steps)
        rows = self._rows()
        if self.column + steps <= self.columns and fitting > self.columns * 2 // 3 and rows is None:
            return state
        state = self.engine.move(state, shift, fitting, rows)
        self.column, self.columns = self.column - shift, fitting
        self.first -= shift
        return state

    def _rows(self) -> np.ndarray | None:
        """Where nothing waits and most of every shard's slots are free: the rows (in the shard) to go on with."""
        per_shard = self.live.reshape(self.shards, -1)
        most = max(1, int(per_shard.sum(1).max()))
        size = per_shard.shape[1]
        while size % 4 == 0 and size // 4 >= most:  # by four: every size compiles
            size //= 4
        if self.waiting() or size == per_shard.shape[1]:
            return None
        order = np.argsort(~per_shard, axis=1, kind="stable")[:, :size]
        for name in ("owner", "live", "position", "first"):
            array = getattr(self, name).reshape(self.shards, -1)
            setattr(self, name, np.take_along_axis(array, order, 1).reshape(-1))
        return order.reshape(-1).astype(np.int32)

    def _columns(self, n: int) -> int:
        # A slot that ends within a segment leaves the others up to a segment ahead of its last column.
        return min(bucket(n), self.width + self.max_response + SEGMENT)

    def collect(self, emitted: Emitted, flags: Any) -> Iterator[tuple[int, Response]]:
        """Takes over what a segment made; yields what has ended."""
        rows, parts = _own_rows(emitted)
        active = self.live
        for slot, part in zip(rows, zip(*parts, strict=True), strict=True):
            if active[slot]:
                n = flags.count[slot]
                self.parts[self.owner[slot]].append(Emitted(*(x[:n] for x in part)))
        ended = np.flatnonzero(active & ~flags.live)
        self.position = self.position + flags.count
        self.live = flags.live.copy()
        self.column += int(flags.steps)
        for slot in ended:
            index = int(self.owner[slot])
            pieces: list[Any] = self.parts.pop(index) or [[x[0, :0] for x in parts]]
            arrays = (np.concatenate(x) for x in zip(*pieces, strict=True))
            yield index, Response(*arrays, stopped=bool(flags.stopped[slot]), length=int(self.position[slot]))


def make_rollout(engine: Engine, *, max_response: int, slots: int | None = None) -> Callable[..., Rollouts]:
    """Builds ``rollout(weights, prompts, law, seed, step, limit=None, occupancy=None) → Rollouts``: rows in, the same
    rows out, as NumPy arrays on the host. Of several processes each gets the tokens of its own rows, and all lengths.

    ``weights`` are ``engine.cast(params)``: cast and resharded once, for as many calls as they serve.

    Args:
        max_response: tokens; longer responses are cut.
        slots: rows decoded together; None: all rows of the prompts.
    """

    def rollout(
        weights: Params,
        prompts: Prompts,
        law: Law,
        seed: int,
        step: int,
        limit: int | None = None,
        occupancy: Occupancy | None = None,
    ) -> Rollouts:
        host: Prompts = hosts.fetch(prompts)
        B, R = len(host.lengths), max_response
        rows = zip(host.tokens, host.lengths, host.ids, host.samples, strict=True)
        requests = [Request(t[len(t) - n :].tolist(), int(i), int(s)) for t, n, i, s in rows]
        tokens, lengths, stopped = np.zeros((B, R), np.int32), np.zeros(B, np.int32), np.zeros(B, bool)
        logp, entropy = np.zeros((2, B, R), engine.float_dtype)
        topk_ids = np.zeros((B, R, engine.support), np.int32)
        topk_logp = np.zeros(topk_ids.shape, engine.float_dtype)
        arrays = (tokens, logp, entropy, topk_ids, topk_logp)
        width = min(bucket(int(host.lengths.max()), 16), host.tokens.shape[1])  # or every batch would compile
        made = generate(
            engine, weights, requests, law, seed, step,
            slots=min(slots or B, B), max_response=R, limit=limit, width=width, occupancy=occupancy,
        )  # fmt: skip
        for row, response in made:
            lengths[row], stopped[row] = response.length, response.stopped
            made_here = len(response.tokens)
            for array, value in zip(arrays, response, strict=False):
                array[row, :made_here] = value
        result: Any = (tokens, lengths, stopped, logp, entropy, topk_ids, topk_logp)
        return Rollouts(host, *result)

    return rollout


def _own_rows(emitted: Emitted) -> tuple[list[int], tuple[np.ndarray, ...]]:
    """The slots whose rows this process holds, and their arrays."""
    if emitted.tokens.is_fully_addressable:
        return list(range(emitted.tokens.shape[0])), tuple(jax.device_get(emitted))

    def mine(x: jax.Array) -> dict[int, np.ndarray]:
        return {s.index[0].start or 0: np.asarray(s.data) for s in x.addressable_shards}

    pieces = [mine(x) for x in emitted]
    starts = sorted(pieces[0])
    rows = [start + i for start in starts for i in range(len(pieces[0][start]))]
    return rows, tuple(np.concatenate([p[s] for s in starts]) for p in pieces)
