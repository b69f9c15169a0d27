"""The command line as a user meets it: help, output, and one line for what is wrong."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer

from peftdyno.bench import cli
from peftdyno.bench.cli import PANELS
from peftdyno.kernels import dispatch
from peftdyno.kernels.library import PRIMITIVES

ROOT = Path(__file__).parent.parent.parent
COMMANDS = cli._commands()
COMMAND_LINE = re.compile(r"^    (peftdyno .*)$|`(peftdyno [^`\n]+)`", re.MULTILINE)


def test_every_command_has_its_place() -> None:
    wanted = {"train", "eval", "generate", "inspect", "bench", "report", "tasks", "methods", "models", "env", "merge",
              "pscp", "demo"}  # fmt: skip
    assert wanted <= COMMANDS.keys()
    for name, module in COMMANDS.items():
        assert module.PANEL in PANELS and module.EXAMPLES, name
        assert all(line.startswith(f"peftdyno {name.replace('_', '-')}") for line in module.EXAMPLES), name


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_of_every_command_has_examples(name: str, shell) -> None:
    ran = shell(name.replace("_", "-"), "-h")
    assert ran.status == 0 and "Usage" in ran.out and "Examples" in ran.out
    assert " ".join(COMMANDS[name].EXAMPLES[0].split()[:2]) in " ".join(ran.out.split())


@pytest.mark.parametrize("name", ["tasks", "methods", "models", "env"])
def test_listings(name: str, shell) -> None:
    plain, parsed = shell(name), shell(name, "--json").json
    assert plain.status == 0 and parsed
    names = [entry["name"] for entry in parsed] if isinstance(parsed, list) else list(parsed)
    assert all(entry.split("-")[0] in plain.out for entry in names)


def test_env_says_which_implementation_each_operator_takes(shell) -> None:
    operators, table = shell("env", "--json").json["operators"], shell("env").out
    assert operators.keys() == PRIMITIVES.keys() > {"attention", "adamw_", "lora_terms_", "nf4_absmax"}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, primitive in PRIMITIVES.items():
        taken = dispatch.choose(name, primitive.implementations, device)
        assert operators[name].startswith(f"{taken} (") and f"operators.{name}" in table


@pytest.mark.parametrize(
    ("choice", "made", "device", "said"),
    [
        ("auto", "triton", "cuda", "triton (made for cuda)"),
        ("auto", "triton", "cpu", "reference (plain PyTorch: there is no 'cpu' implementation here)"),
        ("auto", "cpu", "cuda", "reference (plain PyTorch: there is no 'triton' implementation here)"),
        ("reference", "cpu", "cpu", "reference (chosen by --kernels)"),
    ],
)
def test_an_implementation_is_explained(
    choice: str, made: str, device: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_choice", choice)
    assert dispatch.explain("glu", {"reference": None, made: None}, torch.device(device)) == said


def test_unknown_instruction_set_is_one_line() -> None:
    child = subprocess.run(
        [sys.executable, "-P", "-m", "peftdyno.bench", "env"],
        env={**os.environ, "PEFTDYNO_ISA": "mmx"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 2
    assert child.stderr.startswith("peftdyno: PEFTDYNO_ISA: ") and child.stderr.count("\n") == 1


def documented() -> list[tuple[str, list[str]]]:
    """(file, words) of every command line in the docs, on lines of their own and within sentences."""
    files = [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "guides").glob("*.md"))]
    found = [(file.name, text) for file in files for text in COMMAND_LINE.findall(file.read_text())]
    return [(name, shlex.split(one or other)[1:]) for name, (one, other) in found]


def test_documented_commands_exist() -> None:
    commands = typer.main.get_command(cli.build()).commands
    lines = documented()
    assert len(lines) > 10
    for name, words in lines:
        if words[0] == "-h":
            continue
        assert words[0] in commands, (name, words)
        known = {option for parameter in commands[words[0]].params for option in parameter.opts} | {"-h"}
        assert {word for word in words[1:] if word.startswith("-")} <= known, (name, words)


def test_train_eval_generate_merge(shell, tmp_path: Path) -> None:
    out, adapter = tmp_path / "run", tmp_path / "run" / "adapter"
    record = shell("train", "--task", "sst2", *shell.job("--out", out, "--json", "--lr", 0.01)).json
    assert json.loads((out / "run.json").read_text()) == record
    scored = shell(
        "eval", "--task", "sst2", "--data", shell.data, "--adapter", adapter, "--adapter", adapter, "--dtype", "fp32",
        "--out", tmp_path / "eval", "--json",
    ).json  # fmt: skip
    assert [result["scores"] for result in scored["results"]] == [record["scores"]] * 2
    lines = (tmp_path / "eval" / "adapter-0.jsonl").read_text()
    assert lines == (out / "predictions.jsonl").read_text()

    merged = tmp_path / "merged"
    assert shell("merge", "--adapter", adapter, "--out", merged).status == 0
    prompt = ("a bright film", "--max-new-tokens", 6, "--dtype", "fp32")
    with_adapter, folded = shell("generate", "--adapter", adapter, *prompt), shell("generate", "-m", merged, *prompt)
    assert with_adapter.status == folded.status == 0 and with_adapter.out == folded.out
    again = shell("generate", "-a", adapter, *prompt, "--json").json
    assert again[0]["answer"] == with_adapter.out.rstrip("\n") and again[0]["prompt"] == "a bright film"


def test_eval_of_the_untuned_model_is_the_baseline(shell, tmp_path: Path) -> None:
    record = shell("train", "--task", "sst2", *shell.job("--out", tmp_path / "run", "--json")).json
    scored = shell(
        "eval",
        "-m",
        shell.model,
        "-t",
        "sst2",
        "--data",
        shell.data,
        "--out",
        tmp_path / "e",
        "--dtype",
        "fp32",
        "--json",
    )
    assert scored.json["results"][0]["scores"] == record["baseline_scores"]
    again = ("eval", "-m", shell.model, "-t", "sst2", "--data", shell.data, "--out", tmp_path / "e", "--limit-test", 3)
    assert "holds the scores of other data" in shell.fails(*again)


def test_bench_and_report(shell, tmp_path: Path) -> None:
    grid = ("--methods", "lora,ln-tuning", "--tasks", "sst2", "--seeds", "1,2")
    ran = shell("bench", *grid, *shell.job("--out", tmp_path, "--json", "--quiet"))
    assert ran.status == 0 and len(ran.json["trained"]) == 4
    report = shell("report", tmp_path)
    assert report.status == 0 and "lora" in report.out and "ln-tuning" in report.out
    assert {path.name for path in tmp_path.glob("report.*")} == {"report.md", "report.json", "report.html"}
    plain = shell("report", tmp_path, "--json").json
    for row in plain["rows"]:
        scores = [
            100
            * json.loads((tmp_path / f"runs/{row['method']}/sst2/seed-{seed}/run.json").read_text())["scores"][
                "corrected"
            ]["f1"]
            for seed in (1, 2)
        ]
        assert row["score"] == pytest.approx(sum(scores) / 2)


def test_failures_of_a_sweep_are_a_status(shell, tmp_path: Path) -> None:
    ran = shell("bench", "--methods", "ia3", "--tasks", "rte", *shell.job("--out", tmp_path))
    assert ran.status == 1 and "1 failed" in ran.out and "has no folder 'rte'" in ran.out


def test_inspect_marks_labels(shell) -> None:
    line = ("inspect", "-t", "sst2", "-m", shell.model, "--data", shell.data, "-n", 1)
    shown, example = shell(*line).out, shell(*line, "--json").json[0]
    assert "".join(example["pieces"]) == example["prompt"] + example["response"] + "<|im_end|>"
    marked = [row for row in shown.splitlines() if row.startswith("*")]
    assert len(marked) == len(example["tokens"]) - example["num_prompt"]
    assert marked[-1].endswith("'<|im_end|>'") and example["prompt"] in shown
    test = shell(*line, "--split", "test", "--json").json[0]
    assert len(test["tokens"]) == test["num_prompt"]


def test_doubled_beginning_of_text(shell, tiny_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "doubled"
    model.mkdir()
    for path in tiny_model.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text("{{ bos_token }}" + template)
    assert "two '<|im_start|>'" in shell.fails("inspect", "-t", "sst2", "-m", model, "--data", shell.data)


def test_several_seeds_have_a_folder_each(shell, tmp_path: Path) -> None:
    ran = shell("train", "--task", "sst2", "--seed", "3,4", *shell.job("--out", tmp_path, "--json"))
    assert [record["seed"] for record in ran.json] == [3, 4]
    for seed in (3, 4):
        there = {path.name for path in (tmp_path / f"seed-{seed}").iterdir()}
        assert {"run.json", "adapter", "metrics.jsonl", "predictions.jsonl"} <= there


def test_four_bit_base(shell, tmp_path: Path) -> None:
    line = ("train", "-t", "sst2", "--quant", "nf4", *shell.job("--out", tmp_path / "run", "--json"))
    record = shell(*line).json
    assert record["model"]["quant"] == "nf4" and record["flops"]["equal_by_layer"]
    shell("train", "-t", "sst2", *shell.job("--out", tmp_path / "dense"))
    dense = json.loads((tmp_path / "dense" / "run.json").read_text())
    assert dense["loss"]["first"] != record["loss"]["first"], "four bits must change the frozen weights"
    scored = shell(
        "eval", "-t", "sst2", "--data", shell.data, "-a", tmp_path / "run" / "adapter", "--dtype", "fp32",
        "--quant", "nf4", "--out", tmp_path / "eval", "--json",
    ).json  # fmt: skip
    assert scored["results"][0]["scores"] == record["scores"]
    assert "unknown quantisation 'nf5'" in shell.fails("generate", "-m", shell.model, "--quant", "nf5", "hi")


def test_config_file(shell, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(
        f"model: {shell.model}\ndata: {shell.data}\ntask: sst2\nmethod: ia3\nsteps: 2\nseed: 9\n"
        "ia3: {feedforward: false}\n"
    )
    ran = shell(
        "train", "--config", tmp_path / "job.yaml", "--out", tmp_path / "run", "--no-eval", "--json", "--steps", 3
    )
    assert (ran.json["seed"], ran.json["steps"], ran.json["method"]["name"]) == (9, 3, "ia3")
    assert ran.json["method"]["settings"]["feedforward"] is False and "scores" not in ran.json


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("trian",), "No such command 'trian'"),
        (("train", "--mehtod", "lora"), "No such option: --mehtod"),
        (("train", "--task", "sst2"), "--out is missing"),
        (("train", "--out", "x"), "--task is missing"),
        (("train", "--task", "sst3", "--out", "x"), "unknown task 'sst3'; did you mean sst2"),
        (("train", "--task", "sst2", "--method", "lorra", "--out", "x"), "unknown method 'lorra'; did you mean lora"),
        (("train", "--task", "sst2", "--out", "x", "--set", "lora.rnk=1"), "unknown lora setting 'rnk'"),
        (("train", "--task", "sst2", "--out", "x", "--seed", "a"), "--seed a"),
        (("train", "--task", "sst2", "--out", "x", "--dtype", "fp8"), "setting 'dtype' is 'fp8'"),
        (("train", "--task", "sst2", "--out", "x", "--data", "nowhere"), "data folder nowhere does not exist"),
        (("train", "--task", "gen-order", "--out", "x", "--model", "smolm2"), "unknown model 'smolm2'; did you mean"),
        (("train", "--task", "gen-order", "--out", "x", "--model", "./none"), "./none: no such model folder"),
        (("eval", "--task", "sst2", "--out", "x", "--adapter", "none", "--data", "{data}"), "none/adapter_config.json"),
        (("eval", "--task", "gen-order", "--out", "x", "-m", "{model}", "--kernels", "fast"), "--kernels 'fast'"),
        (("eval", "--task", "gen-order", "--out", "x", "-m", "{model}", "--device", "tpu"), "--device 'tpu'"),
        (("generate", "--dtype", "int8", "-m", "{model}", "hi"), "unknown --dtype 'int8'"),
        (("inspect", "--task", "gen-order", "--split", "tset"), "unknown split 'tset'; did you mean test"),
        (("bench", "--methods", "lora", "--tasks", "sst2", "--out", "x", "--together", "0"), "--together 0"),
        (("bench", "--methods", "lora", "--out", "x"), "a sweep needs tasks"),
        (("report", "nowhere"), "nowhere is no folder of runs"),
        (("methods", "lorra"), "unknown method 'lorra'"),
        (("pscp", "--score", "1"), "missing; give all of"),
        (("pscp", "--score", "101", "--parameters", "1", "--tflop", "0", "--memory", "1"), "score is 101"),
        (("merge", "--adapter", "none", "--out", "x"), "none/adapter_config.json"),
    ],
)
def test_wrong_input_is_one_line(words: tuple[str, ...], message: str, shell, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    filled = [word.format(data=shell.data, model=shell.model) for word in words]
    assert message in shell.fails(*filled)
    assert not (tmp_path / "x" / "run.json").exists()


def test_places_that_cannot_be_written(shell, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for line in (
        ("train", "-t", "sst2", *shell.job("--out", tmp_path / "file")),
        ("train", "-t", "sst2", *shell.job("--out", tmp_path / "file" / "run")),
        ("bench", "--methods", "lora", "--tasks", "sst2", *shell.job("--out", tmp_path / "file")),
    ):
        assert str(tmp_path / "file") in shell.fails(*line, "--quiet")
    assert (tmp_path / "file").read_text() == "kept"


def test_missing_column_names_file_and_row(shell, tmp_path: Path) -> None:
    folder = tmp_path / "sst2"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"sentence": "a film", "label": 0}\n{"text": "a film", "label": 1}\n')
    said = shell.fails("train", "-t", "sst2", "--data", tmp_path, "-m", shell.model, "--out", tmp_path / "run")
    assert "train.jsonl row 2" in said and "column 'sentence' is missing" in said


def test_methods_that_cannot_be_merged_say_why(shell, tmp_path: Path) -> None:
    run = tmp_path / "run"
    line = ("train", "-t", "sst2", "--method", "prompt-tuning", "--no-eval", *shell.job("--out", run))
    assert shell(*line).status == 0
    said = shell.fails("merge", "--adapter", run / "adapter", "--out", tmp_path / "merged")
    assert "prompt-tuning" in said and not (tmp_path / "merged").exists()


def test_published_tables(shell, tmp_path: Path) -> None:
    assert "PSCP" in shell("pscp", "--published").out
    assert shell("pscp", "--published", "--page", tmp_path / "page.md").status == 0
    assert (tmp_path / "page.md").read_text().startswith("# PSCP as published")
    one = shell("pscp", "--score", 80, "--parameters", 0, "--tflop", 0, "--memory", 0, "--json").json
    assert one["pscp"] == 80


def test_demo_ends_with_the_table_and_is_done_at_once_the_second_time(shell, tmp_path: Path) -> None:
    line = ("demo", "-m", shell.model, "--methods", "lora,bitfit", "--steps", 2, "--out", tmp_path, "--quiet")
    first = shell(*line)
    assert first.status == 0 and "PSCP" in first.out and str(tmp_path / "report.html") in first.out
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("run.json")}
    second = shell(*line)
    assert len(before) == 2 and before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("run.json")}
    assert second.out == first.out


@pytest.mark.slow
def test_interrupt_is_one_line_and_goes_on(shell, tmp_path: Path) -> None:
    line = ["train", "-t", "sst2", *map(str, shell.job("--out", tmp_path, "--steps", 2000))]
    heeded = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731 - tests in the background inherit SIG_IGN
    child = subprocess.Popen(
        [sys.executable, "-m", "peftdyno.bench", *line], stderr=subprocess.PIPE, text=True, preexec_fn=heeded
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    said = child.communicate(timeout=60)[1].splitlines()
    assert child.returncode == 130 and "Traceback" not in " ".join(said), said
    assert said[-1] == "peftdyno: interrupted; the same command goes on from here"
