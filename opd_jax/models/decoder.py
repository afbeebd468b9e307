"""One decoder for Llama, Qwen2, Qwen3, Mistral and their kin: families differ by fields, not by classes.

Weights are a plain dict; Flax NNX modules are built around them at trace time and do not leave this file. Training and
scoring scan stacked layers (``forward``); sampling uses per-layer weights in compute precision (``decode_layer``,
``prefill``, ``decode_step``). All of them return hidden states: ``unembed``, or a loss, meets the head.

Weight shapes are those of Hugging Face checkpoints, [out, in], with the head axis split off and layers stacked.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from opd_jax.mesh import Axes, Layout, constrain
from opd_jax.models.attention import attention, causal_mask, linear, product, self_attention, wide
from opd_jax.models.cache import Cache
from opd_jax.models.embedding import embed
from opd_jax.models.rope import RopeScaling, rotate, rotations
from opd_jax.types import Params

NO_WINDOW = 2**30  # wider than any sequence
_INPUT = "layer_input"
ACTIVATION: Axes = ("batch", None, None)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and family switches. ``windows`` holds one sliding window per layer (None: full attention everywhere)."""

    family: str
    vocab_size: int
    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    max_positions: int
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    windows: tuple[int | None, ...] | None = None

    @property
    def layer_windows(self) -> tuple[int, ...]:
        return tuple(NO_WINDOW if w is None else w for w in self.windows or (None,) * self.layers)

    @property
    def longest_text(self) -> int:
        """Tokens that the model is made for; in most files ``max_positions`` leaves out linear and YaRN scaling."""
        scaling = self.rope_scaling
        if scaling is None or scaling.kind == "llama3":
            return self.max_positions
        return max(self.max_positions, int(scaling.factor * (scaling.original_max_positions or self.max_positions)))


class Spec(NamedTuple):
    """One weight: shape, logical axes, and the standard deviation it is initialised with (None: ones, 0: zeros)."""

    shape: tuple[int, ...]
    axes: Axes
    std: float | None


def init_std(c: DecoderConfig) -> float:
    """0.5 / √D: 0.02 at width 576, as usual there; small models learn several times faster than with 0.02."""
    return 0.5 * c.width**-0.5


def layer_specs(c: DecoderConfig) -> dict[str, Spec]:
    """The weights of one layer."""
    D, F, N, K, H = c.width, c.hidden, c.heads, c.kv_heads, c.head_dim
    std = init_std(c)
    residual_std = std / (2 * c.layers) ** 0.5  # keeps the residual stream's variance independent of depth (GPT-2)
    specs = {
        "attention_norm": Spec((D,), ("embed",), None),
        "q": Spec((N, H, D), ("heads", None, "embed"), std),
        "k": Spec((K, H, D), ("kv_heads", None, "embed"), std),
        "v": Spec((K, H, D), ("kv_heads", None, "embed"), std),
        "o": Spec((D, N, H), ("embed", "heads", None), residual_std),
        "mlp_norm": Spec((D,), ("embed",), None),
        "gate": Spec((F, D), ("mlp", "embed"), std),
        "up": Spec((F, D), ("mlp", "embed"), std),
        "down": Spec((D, F), ("embed", "mlp"), residual_std),
    }
    if c.qkv_bias:
        specs |= {
            "q_bias": Spec((N, H), ("heads", None), 0.0),
            "k_bias": Spec((K, H), ("kv_heads", None), 0.0),
            "v_bias": Spec((K, H), ("kv_heads", None), 0.0),
        }
    if c.qk_norm:
        specs |= {"q_norm": Spec((H,), (None,), None), "k_norm": Spec((H,), (None,), None)}
    return specs


def parameter_specs(c: DecoderConfig) -> dict[str, Any]:
    """The whole tree: ``embed`` [V, D], ``layers`` (every weight [L, …]), ``norm`` [D], ``head`` [V, D] if untied."""
    stacked = {k: Spec((c.layers, *s.shape), (None, *s.axes), s.std) for k, s in layer_specs(c).items()}
    specs: dict[str, Any] = {
        "embed": Spec((c.vocab_size, c.width), ("vocab", "embed"), init_std(c)),
        "layers": stacked,
        "norm": Spec((c.width,), ("embed",), None),
    }
    if not c.tie_embeddings:
        specs["head"] = Spec((c.vocab_size, c.width), ("vocab", "embed"), init_std(c))
    return specs


def _map_specs(f: Callable[[str, Spec], Any], specs: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    return {k: f(prefix + k, s) if isinstance(s, Spec) else _map_specs(f, s, f"{prefix}{k}.") for k, s in specs.items()}


def parameter_shardings(c: DecoderConfig, layout: Layout) -> dict[str, Any]:
    """The sharding of every weight; refuses a mesh that a weight does not divide over."""

    def sharding(name: str, spec: Spec) -> Any:
        layout.check(name, spec.shape, spec.axes)
        return layout.sharding(spec.axes)

    return _map_specs(sharding, parameter_specs(c))


def abstract_params(c: DecoderConfig) -> Params:
    """Shapes of the float32 weights, on this process's first device."""
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return _map_specs(lambda _, s: jax.ShapeDtypeStruct(s.shape, jnp.float32, sharding=one), parameter_specs(c))


def init_params(c: DecoderConfig, key: Array, layout: Layout | None = None) -> Params:
    """Random float32 weights, created sharded where there is a layout."""

    def init(key: Array) -> Params:
        def weight(name: str, s: Spec) -> Array:
            if s.std is None:
                return jnp.ones(s.shape, jnp.float32)
            # keyed by name, so that a weight does not depend on which others exist
            sub = jax.random.fold_in(key, zlib.crc32(name.encode()))
            return s.std * jax.random.normal(sub, s.shape, jnp.float32)

        return _map_specs(weight, parameter_specs(c))

    return jax.jit(init, out_shardings=parameter_shardings(c, layout) if layout else None)(key)


class Layer(nnx.Module):
    """Pre-norm attention and SwiGLU block; ``attend(q, k, v)`` decides what the queries see."""

    attention_norm: nnx.Param
    mlp_norm: nnx.Param
    o: nnx.Param
    gate: nnx.Param
    up: nnx.Param
    down: nnx.Param

    def __init__(self, c: DecoderConfig):
        self.c = c
        for name, spec in layer_specs(c).items():
            setattr(self, name, nnx.Param(jnp.zeros(spec.shape)))

    def __call__(self, x: Float[Array, "B T D"], cos: Array, sin: Array, attend: Callable, layout: Layout | None):
        h = rms_norm(x, self.attention_norm[...], self.c.norm_eps)
        q, k, v = self._head("q", h), self._head("k", h), self._head("v", h)
        k, v = rotate(k, cos, sin).swapaxes(1, 2), v.swapaxes(1, 2)  # [B, K, T, H]
        attended, kept = attend(rotate(q, cos, sin), k, v)
        o = self.o[...]
        x = x + linear(attended.reshape(*x.shape[:2], -1), o.reshape(o.shape[0], -1))
        x = constrain(x, ACTIVATION, layout)
        h = rms_norm(x, self.mlp_norm[...], self.c.norm_eps)
        h = jax.nn.silu(linear(h, self.gate[...])) * linear(h, self.up[...])
        h = constrain(h, ("batch", None, "mlp"), layout)
        return constrain(x + linear(h, self.down[...]), ACTIVATION, layout), kept

    def _head(self, name: str, h: Array) -> Array:
        w = getattr(self, name)[...]
        y = linear(h, w.reshape(-1, w.shape[-1])).reshape(*h.shape[:2], *w.shape[:2])
        if self.c.qkv_bias:
            y = y + getattr(self, name + "_bias")[...].astype(y.dtype)
        if self.c.qk_norm and name != "v":
            y = rms_norm(y, getattr(self, name + "_norm")[...], self.c.norm_eps)
        return y


@functools.cache
def _layer_graph(c: DecoderConfig) -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(lambda: Layer(c)))[0]


def _layer(c: DecoderConfig, weights: dict[str, Array]) -> Layer:
    return nnx.merge(_layer_graph(c), nnx.State({k: nnx.Param(w) for k, w in weights.items()}))


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """x / √(mean x² + eps) · scale, in float32, returned in x's dtype."""
    h = x.astype(wide(x.dtype))
    h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + eps)
    return h.astype(x.dtype) * scale.astype(x.dtype)


def head(params: Params) -> Float[Array, "V D"]:
    """The output head: ``head``, or the embedding table where they are tied."""
    return params["head"] if "head" in params else params["embed"]


def unembed(hidden: Float[Array, "*rows D"], head_VD: Float[Array, "V D"]) -> Float[Array, "*rows V"]:
    """Logits in float32 (or wider)."""
    return product(hidden, head_VD.astype(hidden.dtype))


def forward(
    params: Params,
    c: DecoderConfig,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    *,
    dtype: Any = jnp.float32,
    remat: str = "none",
    layout: Layout | None = None,
    kernel: bool = True,
) -> Float[Array, "B T D"]:
    """Final hidden states (after the last norm) of padded or packed rows.

    Args:
        positions: rotary position of each token, counted within its segment.
        segments: 0 marks padding; a token attends to earlier tokens of its own segment only.
        dtype: compute precision; weights of any dtype are cast where they are used.
        remat: what a layer keeps for the backward pass: ``none`` recomputed, everything is kept; ``dots``: the results
            of its matrix products; ``full``: its input alone; ``offload``: that, in the host's memory.
        kernel: attend by the splash kernel, which has no second derivative, where there is one.
    """

    def block(x: Array, inputs: tuple[dict[str, Array], Array]) -> tuple[Array, None]:
        weights, window = inputs

        def attend(q: Array, k: Array, v: Array) -> tuple[Array, None]:
            return self_attention(q, k, v, positions, segments, window if same is None else same, layout), None

        return _layer(c, weights)(x, cos, sin, attend, layout)

    cos, sin = rotations(positions, c.head_dim, c.rope_theta, c.rope_scaling)
    x = constrain(embed(params["embed"], tokens, dtype, layout), ACTIVATION, layout)
    windows = jnp.asarray(c.layer_windows, jnp.int32)
    same = c.layer_windows[0] if kernel and len(set(c.layer_windows)) == 1 else None
    x, _ = jax.lax.scan(_saving(block, remat), x, (params["layers"], windows))
    return rms_norm(x, params["norm"], c.norm_eps)


def _saving(block: Callable, remat: str) -> Callable:
    if remat == "none":
        return block
    policies = jax.checkpoint_policies
    if remat == "offload":
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[], names_which_can_be_offloaded=[_INPUT], offload_src="device",
            offload_dst="pinned_host",
        )  # fmt: skip
    else:
        policy = {"dots": policies.dots_with_no_batch_dims_saveable, "full": policies.nothing_saveable}[remat]
    return jax.checkpoint(lambda x, inputs: block(checkpoint_name(x, _INPUT), inputs), policy=policy)


def decode_layer(
    stacked: dict[str, Array], i: Array | int, c: DecoderConfig, dtype: Any, layout: Layout | None = None
) -> dict[str, Array]:
    """Layer i of the stacked weights for sampling: cast, and resharded by ``layout``'s table once, so that the decode
    loop holds no parameter-sized collective. Apart, since indexing stacked weights in that loop costs a third."""
    return {k: constrain(stacked[k][i].astype(dtype), s.axes, layout) for k, s in layer_specs(c).items()}


def decode_ends(params: Params, c: DecoderConfig, dtype: Any, layout: Layout | None = None) -> Params:
    """As ``decode_layer``, what is not in a layer: embedding, last norm, head."""
    specs = parameter_specs(c)
    return {k: constrain(w.astype(dtype), specs[k].axes, layout) for k, w in params.items() if k != "layers"}


def prefill(
    weights: Params,
    c: DecoderConfig,
    tokens: Int[Array, "B P"],
    positions: Int[Array, "B P"],
    segments: Int[Array, "B P"],
    cache: Cache,
    layout: Layout | None = None,
) -> tuple[Float[Array, "B D"], Cache]:
    """Runs prompts (right-aligned) through ``decode_layer`` weights; the cache's columns 0 … P−1 are filled.

    Returns the hidden state of the last column, which predicts the first response token.
    """
    cos, sin = rotations(positions, c.head_dim, c.rope_theta, c.rope_scaling)
    x = weights["embed"][tokens]
    for i, window in enumerate(c.layer_windows):

        def attend(q: Array, k: Array, v: Array, window: int = window) -> tuple[Array, tuple[Array, Array]]:
            return self_attention(q, k, v, positions, segments, window, layout), (k, v)

        x, (k, v) = _layer(c, weights["layers"][i])(x, cos, sin, attend, layout)
        cache = cache.write(i, 0, k, v)
    x = rms_norm(x[:, -1], weights["norm"], c.norm_eps)
    return x, cache.mark(0, positions, segments)


def decode_step(
    weights: Params,
    c: DecoderConfig,
    tokens: Int[Array, " B"],
    positions: Int[Array, " B"],
    column: Int[Array, ""],
    cache: Cache,
    layout: Layout | None = None,
) -> tuple[Float[Array, "B D"], Cache]:
    """One token per row, written to ``column`` of the cache; returns the hidden state that predicts the next one."""
    cos, sin = rotations(positions[:, None], c.head_dim, c.rope_theta, c.rope_scaling)
    x = weights["embed"][tokens][:, None]
    segments = jnp.ones_like(positions)[:, None]
    cache = cache.mark(column, positions[:, None], segments)
    for i, window in enumerate(c.layer_windows):

        def attend(q: Array, k: Array, v: Array, i: int = i, window: int = window, cache: Cache = cache):
            cache = cache.write(i, column, k, v)
            mask = causal_mask(positions[:, None], cache.positions, segments, cache.segments, window)
            return attention(q.astype(cache.k[i].dtype), cache.k[i], cache.v[i], mask).astype(q.dtype), cache

        x, cache = _layer(c, weights["layers"][i])(x, cos, sin, attend, layout)
    return rms_norm(x[:, 0], weights["norm"], c.norm_eps), cache
