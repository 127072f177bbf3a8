"""Runs that train adapters: the same steps on any mesh and after a kill, the base untouched, the result decoded."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.processes import free_port
from tests.training.conftest import ROOT, Command, metrics, run, start, wait_for_step

LORA = ("model.lora.rank=4", "model.base_dtype=float32")


def adapter_of(output: Path) -> dict[str, np.ndarray]:
    return load_file(output / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def trained(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("lora") / "run"
    status, said = run(command(output, *LORA), devices=16)
    assert status == 0, said
    return output


def test_only_the_adapters_are_trained_and_saved(trained: Path, model: Path) -> None:
    adapter = adapter_of(trained)
    assert len(adapter) == 2 * 7 * 3
    assert all(np.abs(adapter[name]).max() > 0 for name in adapter)
    start, merged = load_file(model / "model.safetensors"), load_file(trained / "model" / "model.safetensors")
    changed = {name for name, tensor in start.items() if not np.array_equal(tensor, merged[name])}
    assert changed == {name for name in start if name.endswith("_proj.weight")}
    losses = [json.loads(line)["loss"] for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    # The state: three arrays of each adapter, in float32, and nothing of the 150,000 parameters of the base.
    parameters = sum(tensor.size for tensor in adapter.values())
    stored = sum(file.stat().st_size for file in (trained / "checkpoints" / "4").rglob("*") if file.is_file())
    assert stored < 2 * 3 * 4 * parameters + 100_000


def test_killed_and_on_another_mesh_the_adapter_is_the_same(command: Command, trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    first = start(command(output, *LORA), devices=16)
    wait_for_step(output, [first], 4)
    first.send_signal(signal.SIGKILL)
    first.wait()
    status, said = run(command(output, *LORA), devices=16)
    assert status == 0, said
    assert "going on from the checkpoint of step" in said
    expected = adapter_of(trained)
    assert {name: tensor.tobytes() for name, tensor in adapter_of(output).items()} == {
        name: tensor.tobytes() for name, tensor in expected.items()
    }
    status, said = run(command(tmp_path / "other", *LORA, "mesh.tensor=2", "mesh.fsdp=4"), devices=8)
    assert status == 0, said
    for name, tensor in adapter_of(tmp_path / "other").items():
        np.testing.assert_allclose(tensor, expected[name], rtol=0, atol=2e-4, err_msg=name)


@pytest.mark.slow
def test_two_processes_train_the_adapters_that_one_does(command: Command, tmp_path: Path) -> None:
    words = (*LORA, "training.num_epochs=1", "checkpoint.every_steps=null")
    meeting = (f"mesh.coordinator=127.0.0.1:{free_port()}", "mesh.num_processes=2")
    processes = [
        start(command(tmp_path / "two", *words, *meeting, f"mesh.process_id={i}"), devices=1) for i in range(2)
    ]
    processes.append(start(command(tmp_path / "one", *words), devices=2))
    outputs = [process.communicate(timeout=180)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [row["step"] for row in two] == [row["step"] for row in one] == [1, 2, 3]
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5)
    expected = adapter_of(tmp_path / "one")
    for name, tensor in adapter_of(tmp_path / "two").items():
        np.testing.assert_allclose(tensor, expected[name], rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("base_dtype", ["bfloat16", "int8", "int4"])
def test_beside_a_base_of_fewer_bits_the_losses_are_near(
    command: Command, trained: Path, base_dtype: str, tmp_path: Path
) -> None:
    words = ("model.lora.rank=4", f"model.base_dtype={base_dtype}", "training.max_steps=3")
    status, said = run(command(tmp_path / "run", *words), devices=16)
    if base_dtype == "int4" and jax.__version_info__ < (0, 12):
        assert "model.base_dtype: int4 needs jax 0.12" in said
        return
    assert status == 0, said
    losses = [
        [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()[:3]]
        for output in (tmp_path / "run", trained)
    ]
    np.testing.assert_allclose(*losses, rtol=0.05)
    assert losses[0] != losses[1]


def test_after_fifty_steps_the_loss_is_that_of_training_all_weights(
    command: Command, model: Path, tmp_path: Path
) -> None:
    """Of a model that has learned something else before, at ten times the rate, as adapters want it."""
    texts = {"sums": "I add {i} and {j}. ", "products": "So I take {i}, {j} times. "}
    for name, thinking in texts.items():
        pairs = [(i, i % 7) for i in range(10, 58)]
        rows = [
            {"question": f"{i} and {j}?", "thinking_trajectories": [thinking.format(i=i, j=j) * 2], "attempt": str(i)}
            for i, j in pairs
        ]
        (tmp_path / name).with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def last_loss(name: str, start: Path, data: str, steps: int, rate: float, *more: str) -> float:
        words = [f"model.path={start}", f"data.path={tmp_path / data}.jsonl", f"optimizer.learning_rate={rate}"]
        words += ["training.num_epochs=20", f"training.max_steps={steps}", "training.batch_size=8", *more]
        status, said = run(command(tmp_path / name, *words, "checkpoint.every_steps=null"))
        assert status == 0, said
        return float(json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])["loss"])

    before = last_loss("before", model, "sums", 100, 3e-3)
    learned = tmp_path / "before" / "model"
    full = last_loss("full", learned, "products", 50, 1e-3)
    adapters = last_loss("adapters", learned, "products", 50, 1e-2, "model.lora.rank=16", "model.base_dtype=float32")
    assert full < 1 < 2 * before + 2
    assert adapters <= 1.05 * full


def test_the_adapter_and_the_merged_model_answer_alike(trained: Path, model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"What is {i} + {i + 3}?"}) + "\n" for i in range(4)))

    def answers(name: str, *words: str) -> list[list[int]]:
        output = tmp_path / name
        settings = [
            "model.dtype=float32",
            f"prompts={prompts}",
            f"output={output}",
            "max_total_tokens=120",
            "budget.max_answer_tokens=10",
        ]
        subprocess.run([sys.executable, "decode.py", "generate", *settings, *words], cwd=ROOT, check=True)
        return [json.loads(line)["output_ids"] for line in output.read_text().splitlines()]

    beside = answers("beside.jsonl", f"model.path={model}", f"model.adapter={trained / 'adapter'}")
    assert beside == answers("merged.jsonl", f"model.path={trained / 'model'}")
    assert beside != answers("base.jsonl", f"model.path={model}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("model.lora.rank=65",), "model.lora.rank: 65, where q_proj of this model has 64 dimensions"),
        (("model.lora.rank=0",), "model.lora.rank"),
        (("model.lora.rank=4", "model.lora.targets=q_proj,lm_head"), "model.lora.targets"),
        (("model.lora.rank=4", "model.lora.targets=[]"), "model.lora.targets"),
        (("model.base_dtype=bfloat16",), "model.base_dtype: all weights are trained"),
        (("model.adapter=x",), "model.adapter"),
        (("model.weights=int8",), "model.weights"),
    ],
)
def test_what_cannot_be_is_one_line_before_anything_is_read(
    command: Command, words: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    status, output = run(command(tmp_path / "run", *words, "data.path=/nowhere.jsonl"))
    assert status != 0
    assert said in output
    assert "Traceback" not in output
    assert "nowhere" not in output
