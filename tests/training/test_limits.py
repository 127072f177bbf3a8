"""Full disks, losses that are not finite, held-out examples, and trackers."""

import subprocess
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer

from s1jax.config import DecodingMeshSection, ModelSection
from s1jax.data.examples import load_examples
from s1jax.model.load import load_model
from s1jax.model.token_logprobs import token_logprobs
from tests.small_disk import small_disk
from tests.tiny import QWEN3, model_directory
from tests.training.conftest import Command, metrics, run


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(
    command: Command, undisturbed: Path, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", "2500k") as disk:
        output = disk / "run"
        status, text = run(command(output))
        assert status == 1, text
        assert "could not be written" in text
        assert "No space left" in text
        assert "step 2 is intact" in text
        subprocess.run(["mount", "-o", "remount,size=50m", disk], check=True)
        status, text = run(command(output))
        assert status == 0, text
        assert "going on from the checkpoint of step 2" in text
        assert metrics(output) == metrics(undisturbed)


@pytest.mark.slow
def test_steps_that_are_not_finite_are_skipped_counted_and_end_the_run(command: Command, tmp_path: Path) -> None:
    # Untied: in a tied model the row would be in every token's logits.
    directory = model_directory(tmp_path / "model", QWEN3)
    weights = load_file(directory / "model.safetensors")
    digit = AutoTokenizer.from_pretrained(directory)("7").input_ids[0]
    # More than bfloat16 holds: whatever example has a 7 overflows, so that some steps are finite and some are not.
    weights["model.embed_tokens.weight"][digit] = np.finfo(np.float32).max
    save_file(weights, directory / "model.safetensors")
    words = [f"model.path={directory}", "data.shuffle=false", "training.batch_size=1", "checkpoint.every_steps=1"]
    words += ["model.dtype=bfloat16"]
    output = tmp_path / "run"
    assert run(command(output, *words, "training.max_bad_steps=24"))[0] == 0
    skipped = [row["skipped"] for row in metrics(output)]
    assert 0 < sum(skipped) < len(skipped)
    longest = max(len(streak) for streak in "".join(str(int(s)) for s in skipped).split("0"))
    stopped = tmp_path / "stopped"
    status, text = run(command(stopped, *words, f"training.max_bad_steps={longest}"))
    assert status == 1, text
    assert f"not finite for {longest} steps in a row" in text
    assert "The last checkpoint is that of step" in text
    assert any((stopped / "checkpoints").iterdir())
    assert not (stopped / "model").exists()


@pytest.mark.slow
def test_held_out_loss_and_trackers(command: Command, traces: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    words = [f"data.eval_path={traces}", "training.eval_every=3", "logging.tensorboard=true", "training.batch_size=5"]
    status, text = run(command(output, *words))
    assert status == 0, text
    rows = metrics(output)
    assert [row["step"] for row in rows if "eval_loss" in row] == [3, 6]
    loaded = load_model(ModelSection(path=str(output / "model"), dtype="float32"), DecodingMeshSection(fsdp=16))
    examples = load_examples(str(traces), loaded.tokenizer, block_size=256, overlong="error").examples
    losses = []
    for example in examples:
        padded = np.zeros(256, np.int32)
        padded[: example.input_ids.size] = example.input_ids
        hidden, _ = loaded.model.hidden_states(loaded.params, jnp.asarray(padded[None]), jnp.arange(256)[None])
        targets = jnp.asarray(np.roll(padded, -1)[None])
        logprobs = np.asarray(token_logprobs(loaded.model, loaded.params, hidden, targets)[0][0])
        losses.append(-logprobs[np.flatnonzero(example.loss_mask) - 1].mean())
    assert rows[-1]["eval_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert [path for path in (output / "tensorboard").iterdir() if "tfevents" in path.name]


@pytest.mark.slow
def test_weights_and_biases_offline_keeps_one_run(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    output = tmp_path / "run"
    status, text = run(command(output, "logging.wandb_project=s1jax-test"))
    assert status == 0, text
    run_id = (output / "wandb_id").read_text()
    assert [path for path in (output / "wandb").iterdir() if path.name.endswith(run_id)]
