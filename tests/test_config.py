"""The configuration: every mistake is refused with the key's name, and nothing is taken silently."""

import subprocess
import sys
from pathlib import Path

import pytest

from s1jax.config import BenchmarkConfig, EvaluateConfig, GenerateConfig, QuantiseConfig, ScoreConfig
from s1jax.config_reader import ConfigError, config_help, config_keys, load_config
from s1jax.curation.config import CurateConfig
from s1jax.paths import BucketPath
from s1jax.training.config import TrainConfig

ROOT = Path(__file__).parents[1]
WORDS = ["model.path=m", "input=i", "output=o"]
TRAIN = ["model.path=m", "data.path=d", "training.output_dir=o"]


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("root", [ScoreConfig, GenerateConfig, TrainConfig])
def test_help_lists_every_key_with_type_default_and_meaning(root: type) -> None:
    lines = {line.split()[0]: line for line in config_help(root, "usage").splitlines() if line.startswith("  ")}
    for key, (kind, default, info) in config_keys(root).items():
        assert info.description
        for part in (kind, default, info.description):
            assert part in lines[key]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["modle.dtype=float32"], r"modle: unknown key; did you mean model\?"),
        (["model.dtyp=float32"], r"model\.dtyp: unknown key; did you mean model\.dtype\?"),
        (["batchsize=3"], "batchsize: unknown key; did you mean batch_size"),
        (["batch_size=many"], "batch_size: .*'many'; expected int"),
        (["batch_size=yes"], "batch_size: .*True; expected int"),
        (["batch_size=0"], "batch_size: .*greater than or equal to 1, got 0"),
        (["model.dtype=float8"], r"model\.dtype: .*'float8'; expected float32\|bfloat16\|float16"),
        (["model={path: 3}"], r"model\.path: .*got 3; expected str"),
        (["batch_size"], "'batch_size' is neither a YAML file nor key=value"),
        (["batch_size=[1"], "is not YAML"),
        (["missing.yaml"], r"missing\.yaml: No such file"),
    ],
)
def test_a_mistake_is_refused_by_name(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(ScoreConfig, [*WORDS, *words])


@pytest.mark.parametrize(
    ("root", "words"),
    [
        (GenerateConfig, ["model.path=m"]),
        (EvaluateConfig, ["model.path=m", "tasks=t", "output_dir=o"]),
        (BenchmarkConfig, ["model.path=m"]),
    ],
)
def test_a_cache_is_of_int8_or_of_the_computations_dtype(root: type, words: list[str]) -> None:
    assert load_config(root, [*words, "cache.dtype=int8"]).cache.dtype == "int8"
    assert load_config(root, [*words, "cache.dtype=null"]).cache.dtype is None
    with pytest.raises(ConfigError, match=r"cache\.dtype: .*'int4'; expected int8\|null"):
        load_config(root, [*words, "cache.dtype=int4"])


def test_all_mistakes_are_reported_together() -> None:
    with pytest.raises(ConfigError) as error:
        load_config(ScoreConfig, ["batch_size=0", "inputs=3"])
    lines = str(error.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["batch_size", "input", "inputs", "model", "output"]


def test_later_words_win_and_values_may_hold_equals_signs() -> None:
    config = load_config(ScoreConfig, [*WORDS, "batch_size=3", "batch_size=5", "output=a=b.jsonl"])
    assert (config.batch_size, config.output) == (5, "a=b.jsonl")


def test_scientific_notation_is_a_number() -> None:
    assert load_config(TrainConfig, [*TRAIN, "optimizer.learning_rate=1e-4"]).optimizer.learning_rate == 1e-4


def test_yaml_files_extend_one_another(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("model: {path: base, dtype: float32}\nbatch_size: 2\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "middle.yaml").write_text("extends: ../base.yaml\nbatch_size: 3\ninput: i\n")
    top = tmp_path / "top.yaml"
    top.write_text("extends: sub/middle.yaml\nmodel: {path: top}\noutput: o\n")
    config = load_config(ScoreConfig, [str(top), "output=word"])
    assert config.model.path == "top"
    assert config.model.dtype == "float32"
    assert (config.batch_size, config.input, config.output) == (3, "i", "word")


def test_a_file_without_an_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: /dev/zero\n")
    with pytest.raises(ConfigError, match=r"/dev/zero: larger than"):
        load_config(ScoreConfig, [str(tmp_path / "a.yaml")])


def test_a_circle_of_extends_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(ConfigError, match=r"extends itself through a\.yaml, b\.yaml"):
        load_config(ScoreConfig, [str(tmp_path / "a.yaml")])


def test_yaml_files_in_a_bucket_extend_one_another(bucket: BucketPath) -> None:
    (bucket / "base.yaml").write_text("model: {path: base, dtype: float32}\nbatch_size: 2\n")
    (bucket / "sub" / "middle.yaml").write_text("extends: ../base.yaml\nbatch_size: 3\ninput: i\n")
    (bucket / "top.yaml").write_text(f"extends: {bucket}/sub/middle.yaml\nmodel: {{path: top}}\noutput: o\n")
    config = load_config(ScoreConfig, [f"{bucket}/top.yaml"])
    assert (config.model.path, config.model.dtype, config.batch_size, config.input) == ("top", "float32", 3, "i")
    (bucket / "a.yaml").write_text("extends: sub/../a.yaml\n")
    with pytest.raises(ConfigError, match=rf"^{bucket}/a\.yaml: extends itself through a\.yaml$"):
        load_config(ScoreConfig, [f"{bucket}/a.yaml"])
    with pytest.raises(ConfigError, match=rf"^{bucket}/none\.yaml: no such object or bucket$"):
        load_config(ScoreConfig, [f"{bucket}/none.yaml"])


PATHS = {
    ScoreConfig: ["model.path", "input", "output"],
    GenerateConfig: ["model.path", "prompts", "output", "budget.profile", "plan.output"],
    EvaluateConfig: ["model.path", "tasks", "output_dir", "budget.profile"],
    BenchmarkConfig: ["model.path", "benchmark.output"],
    QuantiseConfig: ["model.path", "model.adapter", "output"],
    TrainConfig: ["model.path", "data.path", "data.eval_path", "training.output_dir", "plan.output"],
    CurateConfig: [
        *["output_dir", "sources.x.path", "evaluation_sets.x.path", "students.x.path", "select.benchmarks.x.path"],
        "select.tokenizer",
    ],
}


@pytest.mark.parametrize("scheme", ["hdfs", "http", "file", "gcs"])
@pytest.mark.parametrize("root", PATHS, ids=lambda root: root.__name__)
def test_paths_of_other_schemes_are_refused_before_anything_is_read(root: type, scheme: str) -> None:
    path = f"{scheme}://somewhere/x.jsonl"
    with pytest.raises(ConfigError) as error:
        load_config(root, [f"{key}={path}" for key in PATHS[root]])
    problems = [line for line in str(error.value).splitlines() if "required" not in line]
    assert sorted(line.split(":")[0] for line in problems) == sorted(PATHS[root])
    for line in problems:
        assert line.endswith(f": {path}: {scheme}:// is not known; paths are local, or begin with gs:// and s3://")
    with pytest.raises(ConfigError, match=f"{scheme}:// is not known"):
        load_config(root, [f"{scheme}://somewhere/x.yaml"])


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*/*.yaml")), ids=lambda p: p.stem)
def test_every_preset_is_valid(path: Path) -> None:
    roots = {"sft": TrainConfig, "decode": GenerateConfig, "eval": EvaluateConfig, "curation": CurateConfig}
    root = roots[path.parent.name]
    more = ["data.path=d"] if root is TrainConfig else []
    load_config(root, [str(path), *more])


def test_the_programs_answer_help_and_mistakes() -> None:
    overview = command("decode.py", "--help")
    assert overview.returncode == 0
    assert all(mode in overview.stdout for mode in ("generate", "score", "benchmark"))
    assert command("decode.py", "dream").returncode == 2
    score_help = command("decode.py", "score", "--help")
    assert score_help.returncode == 0
    assert "model.path" in score_help.stdout
    mistake = command("train.py", "optimiser.learning_rate=1")
    assert mistake.returncode == 2
    assert "optimiser: unknown key; did you mean optimizer?" in mistake.stderr
