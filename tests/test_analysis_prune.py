"""Layers chosen for removal: one that does nothing is found first; what cannot work is refused by name."""

from __future__ import annotations

import jax
import pytest

from opd_jax.analysis.prune import layers_to_drop
from opd_jax.data.tasks import write_task_tokenizer
from opd_jax.errors import InputError
from opd_jax.models.decoder import DecoderConfig, init_params
from opd_jax.models.hf import save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Four layers, of which 2 adds nothing to the residual stream and 1 next to nothing."""
    path = tmp_path_factory.mktemp("prune")
    vocab = write_task_tokenizer(path / "tokenizer", "products-5x2")
    network = DecoderConfig("llama", vocab, 32, 64, 4, 4, 4, 8, 1e-6, 1e4, 64, tie_embeddings=True)
    params = init_params(network, jax.random.key(0))
    for name in ("o", "down"):
        params["layers"][name] = params["layers"][name].at[1].multiply(0.05).at[2].set(0.0)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    save_model(
        path / "model", params, network, tokenizer_from=path / "tokenizer", extra={"chat_template.jinja": template}
    )
    return str(path / "model")


@pytest.mark.exhaustive
def test_layers_without_effect_go_first(model):
    assert layers_to_drop(model, "auto:2", "task:products-5x2") == (1, 2)


def test_indices_and_none(model):
    assert layers_to_drop(model, "4,5,25,26", None) == (4, 5, 25, 26)
    assert layers_to_drop(model, None, None) == ()


@pytest.mark.parametrize(
    ("spec", "prompts", "message"),
    [
        ("auto:2", None, "--prompts"),
        ("auto:4", "task:products-5x2", "has 4 layers; drop 1 … 3"),
        ("auto:0", "task:products-5x2", "has 4 layers"),
        ("four", None, "expected indices as 4,5,25,26, or auto:N"),
    ],
)
def test_refusals(model, spec, prompts, message):
    with pytest.raises(InputError, match=message):
        layers_to_drop(model, spec, prompts)
