"""The device mesh and the one table from logical axis names to mesh axes.

Every parameter and activation carries logical axis names; a ``Layout`` (mesh + table) turns them into shardings. No
``PartitionSpec`` is written anywhere else.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from opd_jax.errors import InputError

MESH_AXES = ("data", "fsdp", "tensor")

Axes = tuple[str | None, ...]
Table = tuple[tuple[str, tuple[str, ...]], ...]

# Training and teacher scoring: batch over data × fsdp, parameters over fsdp, heads / hidden / vocabulary over tensor.
TRAIN: Table = (
    ("batch", ("data", "fsdp")),
    ("embed", ("fsdp",)),
    ("heads", ("tensor",)),
    ("kv_heads", ("tensor",)),
    ("mlp", ("tensor",)),
    ("vocab", ("tensor",)),
)
# Decoding: as above, but no parameter is sharded over fsdp, which would gather every weight for every token.
ROLLOUT: Table = tuple((name, axes) for name, axes in TRAIN if name != "embed")


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh with a table. ``spec(("batch", None))`` → PartitionSpec; hashable, so it may be a static argument."""

    mesh: Mesh
    table: Table = TRAIN

    def spec(self, axes: Axes) -> PartitionSpec:
        table = dict(self.table)
        return PartitionSpec(*(table.get(name) if name else None for name in axes))

    def sharding(self, axes: Axes = ()) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(axes))

    def constrain(self, x: Array, axes: Axes) -> Array:
        """Pins the sharding of an activation inside jit."""
        return jax.lax.with_sharding_constraint(x, self.sharding(axes))

    def put_rows(self, tree: Any) -> Any:
        """Arrays whose first axis is the row axis, from the host onto the mesh; each process gives its own rows."""

        def put(x: Any) -> Array:
            x = np.asarray(x)
            return jax.make_array_from_callback(x.shape, self.sharding(("batch",)), lambda index: x[index])

        return jax.tree.map(put, tree)

    def check(self, what: str, shape: Sequence[int], axes: Axes) -> None:
        """Raises InputError where a dimension does not divide over its mesh axes, naming sizes that would work."""
        table = dict(self.table)
        for size, name in zip(shape, axes, strict=True):
            names = table.get(name, ()) if name else ()
            ways = math.prod(self.mesh.shape[a] for a in names)
            if size % ways:
                good = [d for d in range(1, self.mesh.size + 1) if size % d == 0]
                raise InputError(
                    f"{what}: axis '{name}' has size {size}, which does not divide over mesh.{' × mesh.'.join(names)} "
                    f"= {ways}. Choose a product of those among {good}."
                )


def batch_shards(layout: Layout | None) -> int:
    """Parts that the row axis is cut into."""
    return math.prod(layout.mesh.shape[axis] for axis in dict(layout.table)["batch"]) if layout else 1


def shard_holders(layout: Layout | None) -> list[frozenset[int]]:
    """Of every batch shard the processes that hold it."""
    held: list[set[int]] = [set() for _ in range(batch_shards(layout))]
    if layout:
        for device, index in layout.sharding(("batch",)).devices_indices_map((len(held),)).items():
            held[index[0].start or 0].add(device.process_index)
    return [frozenset(h) for h in held]


def own_rows(layout: Layout | None, rows: int) -> np.ndarray:
    """[rows] bool: which of ``rows`` rows, cut evenly over the batch shards, this process holds."""
    held = np.array([jax.process_index() in h for h in shard_holders(layout)]) if layout else np.ones(1, bool)
    return held[np.arange(rows) * len(held) // rows]


def constrain(x: Array, axes: Axes, layout: Layout | None) -> Array:
    """``layout.constrain`` where there is a layout; a model called without one (a notebook, an oracle test) is free."""
    return x if layout is None else layout.constrain(x, axes)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh (data, fsdp, tensor); one axis may be -1 and takes what the others leave.

    Neighbours on a TPU's torus become neighbours on the axes. Several TPU slices, which only a data-centre network
    connects, lie along ``data``: nothing but the sum of gradients then crosses it.

    Raises:
        InputError: the sizes do not multiply to the number of devices, or ``data`` does not divide over the slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [data, fsdp, tensor]
    if any(s == 0 or s < -1 for s in sizes) or sizes.count(-1) > 1:
        raise InputError(
            f"mesh: sizes must be ≥ 1, at most one of them -1; found (data, fsdp, tensor) = {tuple(sizes)}"
        )
    fixed = math.prod(s for s in sizes if s != -1)
    if -1 in sizes and len(devices) % fixed == 0:
        sizes[sizes.index(-1)] = len(devices) // fixed
    if math.prod(sizes) != len(devices):
        divisors = [d for d in range(1, len(devices) + 1) if len(devices) % d == 0]
        raise InputError(
            f"mesh: (data, fsdp, tensor) = ({data}, {fsdp}, {tensor}) does not fill {len(devices)} devices. "
            f"Sizes must multiply to {len(devices)}; each may be one of {divisors}, and one may be -1."
        )
    slices = len({getattr(d, "slice_index", 0) for d in devices}) if devices[0].platform == "tpu" else 1
    if sizes[0] % slices:
        raise InputError(
            f"mesh: data = {sizes[0]} does not divide over the {slices} TPU slices. Set mesh.data to a multiple of "
            f"{slices}, or to -1."
        )
    if slices == 1:
        return Mesh(mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True), MESH_AXES)
    within, across = [sizes[0] // slices, *sizes[1:]], [slices, 1, 1]
    array = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    return Mesh(array, MESH_AXES)
