"""Kernels that compute something else than attention are found out before a run uses them."""

from pathlib import Path

import jax.numpy as jnp
import pytest

from s1jax.model import attention as module
from s1jax.model.block_attention import block_attention
from s1jax.model.config import QwenConfig
from s1jax.model.kernel_check import checked
from s1jax.model.qwen import Qwen
from tests.tiny import QWEN2


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Qwen:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return Qwen(QwenConfig.from_hf(QWEN2), dtype=jnp.float32, attention="blocks")


def test_a_right_kernel_is_used_and_tried_once(model: Qwen, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checked(model, gradients=True) == model
    monkeypatch.setattr("s1jax.model.kernel_check.attention_errors", None)
    assert checked(model, gradients=True) == model


def sees_other_examples(query, key, value, segment_ids, _):
    return block_attention(query, key, value, None)


def scales_twice(query, key, value, segment_ids, _):
    return block_attention(query * query.shape[-1] ** -0.5, key, value, segment_ids)


def is_not_finite(query, key, value, segment_ids, _):
    return block_attention(query, key, value, segment_ids) * jnp.nan


def has_no_gradient_of_values(query, key, value, segment_ids, _):
    import jax

    return block_attention(query, key, jax.lax.stop_gradient(value), segment_ids)


@pytest.mark.parametrize("wrong", [sees_other_examples, scales_twice, is_not_finite, has_no_gradient_of_values])
def test_a_wrong_kernel_is_said_and_not_used(
    model: Qwen, wrong: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(module.KERNELS, "blocks", wrong)
    assert checked(model, gradients=True).attention == "chunked"
    (line,) = capsys.readouterr().err.splitlines()
    assert "blocks is not used" in line
    assert "chunked attention is used instead" in line
    assert checked(model, gradients=True).attention == "chunked"
