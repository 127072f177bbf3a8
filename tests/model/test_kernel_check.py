"""Kernels that compute something else than attention are found out before a run uses them."""

from pathlib import Path

import jax.numpy as jnp
import pytest

from s1jax.model import attention as module
from s1jax.model import paged_attention as paged_module
from s1jax.model.block_attention import block_attention
from s1jax.model.config import QwenConfig
from s1jax.model.kernel_check import checked
from s1jax.model.paged_attention import _gathered
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


def skips_a_page(query, keys, values, table, last):
    return _gathered(query, keys, values, table.at[:, 1].set(table[:, 0]), last)


def sees_one_more(query, keys, values, table, last):
    return _gathered(query, keys, values, table, last + 1)


def refuses(query, keys, values, table, last):
    raise NotImplementedError("not on this device")


@pytest.mark.parametrize("wrong", [skips_a_page, sees_one_more, refuses])
def test_a_wrong_kernel_for_pages_is_not_used_for_decoding(
    model: Qwen, wrong: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(paged_module.KERNELS, "blocks", wrong)
    assert checked(model, gradients=True) == model
    assert checked(model, gradients=False).attention == "chunked"
    assert "blocks is not used" in capsys.readouterr().err


def test_a_right_kernel_for_pages_is_used(model: Qwen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(paged_module.KERNELS, "blocks", _gathered)
    assert checked(model, gradients=False) == model
