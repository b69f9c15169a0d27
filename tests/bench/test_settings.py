"""Settings from options, files and --set: what wins, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftdyno.bench.settings import gather, make_settings
from peftdyno.engine.errors import UserError


def settings(options=None, config=None, sets=()):
    values = {"model": "m", "task": "sst2", **gather(options or {}, config, sets)}
    return make_settings(values)


def test_later_sources_win(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("batch: 8\nsteps: 10\nlearning_rate: 1e-3\nlora: {rank: 4, dropout: 0}\n")
    found = settings({"steps": 20, "batch": None}, path, ["lora.rank=2", "warmup_ratio=0.2"])
    assert (found.batch, found.steps, found.learning_rate, found.warmup_ratio) == (8, 20, 1e-3, 0.2)
    method = found.build_method()
    assert (method.rank, method.dropout) == (2, 0.0)


def test_values_are_read_as_yaml() -> None:
    found = settings(sets=["lora.target_modules=[q_proj, o_proj]", "lora.rank_stabilised=true", "lora.alpha=3.2e1"])
    method = found.build_method()
    assert method.target_modules == ("q_proj", "o_proj") and method.rank_stabilised and method.alpha == 32.0


def test_section_of_the_method_may_set_its_rate() -> None:
    found = settings(sets=["lora.learning_rate=1e-2", "lora.weight_decay=0"])
    assert (found.learning_rate, found.weight_decay, found.method_settings) == (0.01, 0.0, {})


def test_zero_limit_is_no_limit() -> None:
    assert settings().limit_validation == 256
    assert settings({"limit_validation": 0}).limit_validation is None
    assert settings(sets=["limit_validation=0"]).limit_validation is None
    assert settings(sets=["limit_validation=null"]).limit_validation is None


def test_switches_may_be_yamls() -> None:
    found = settings(sets=["graphs=on", "share_prefix=off", "pack_weights=auto"])
    assert (found.graphs, found.share_prefix, found.pack_weights) == ("on", "off", "auto")


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["lora.rnk=8"], "unknown lora setting 'rnk'; did you mean rank"),
        (["stepz=8"], "unknown setting 'stepz'; did you mean steps"),
        (["ia3.feedforward=false"], "unknown section of settings 'ia3'"),
        (["lora.rank=many"], "setting 'lora.rank' is 'many'"),
        (["lora.rank=0"], "rank 0"),
        (["batch=0"], "setting 'batch' is 0"),
        (["batch=2.5"], "setting 'batch' is 2.5"),
        (["steps=3", "epochs=1"], "steps and epochs are both given"),
        (["seeds=[1, 1]"], "must be different"),
        (["share_prefix=maybe"], "setting 'share_prefix' is 'maybe'"),
        (["graphs=maybe"], "setting 'graphs' is 'maybe'"),
        (["graphs=on", "memory_limit=1GiB"], "graphs is on under a memory limit"),
        (["lora.target_modules=[q_prj]"], "q_prj"),
        (["rank"], "give name=value"),
        (["lora.rank=["], "not readable"),
        (["batch=2", "batch.size=3"], "'batch' is a single setting"),
    ],
)
def test_wrong_settings_are_named(sets: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        settings(sets=sets).build_method()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_config_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml cannot be read"):
        settings(config=tmp_path / "none.yaml")
    for text in ("- a\n- b\n", "a: [", "!!python/object/apply:os.getcwd []"):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(UserError, match=r"config .*bad\.yaml"):
            settings(config=tmp_path / "bad.yaml")
