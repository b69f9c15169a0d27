"""The dataset_info format: laid over known tasks, adding tasks, its warnings and its errors."""

import json
from pathlib import Path

import pytest

from peftdyno.bench import data
from peftdyno.bench.tasks import PEFT_BENCH, TASKS
from peftdyno.bench.tasks_file import TasksFile, apply_tasks_file
from peftdyno.engine.errors import UserError

PUBLISHED = Path(__file__).parents[3] / "shared" / "facts" / "peft_bench_dataset_info.json"


def entry(**changes: object) -> dict:
    columns = {"prompt": "sentence", "response": "label"}
    return {"hf_hub_url": "nyu-mll/glue", "subset": "sst2", "columns": columns} | changes


def apply(tmp_path: Path, content: object) -> TasksFile:
    path = tmp_path / "dataset_info.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return apply_tasks_file(TASKS, path)


def test_instruction_and_splits_are_laid_over(tmp_path: Path) -> None:
    content = {
        "sst2": entry(instruction="Good or bad?", split="train"),
        "sst2_eval": entry(instruction="Good or bad, then?", split="validation"),
        "sst2_test": entry(instruction="", split="test"),
    }
    tasks, warnings = apply(tmp_path, content)
    task, row = tasks["sst2"], {"sentence": "fine", "label": 1}
    assert task.prompt(row) == "Good or bad?\nfine"
    assert task.prompt(row, "test") == "Good or bad, then?\nfine"
    assert task.response(row) == "positive"
    assert task.splits.test == ("validation", "test")
    assert warnings == [
        "sst2: training and evaluation are worded differently",
        "sst2_test: split test serves only where sst2_eval's is absent",
    ]
    assert TASKS["sst2"].instruction != task.instruction
    assert tasks["cola"] is TASKS["cola"]


def test_copy_with_ready_text_serves_rows_that_have_it(tmp_path: Path) -> None:
    ready = {"prompt": "inputs", "response": "targets"}
    content = {"boolq": entry(hf_hub_url="some/copy", subset="boolq", instruction="True?", columns=ready)}
    tasks, warnings = apply(tmp_path, content)
    task = tasks["boolq"]
    assert (task.hub_id, task.subset) == ("some/copy", "boolq")
    assert task.prompt({"inputs": "as it is", "targets": "False"}) == "True?\nas it is"
    assert task.response({"inputs": "as it is", "targets": "False"}) == "False"
    assert task.prompt({"question": "q", "passage": "p", "label": 1}) == "True?\nq\np"
    assert task.response({"question": "q", "passage": "p", "label": 1}) == "true"
    assert "boolq: rows without the columns inputs and targets are worded by the built-in task" in warnings
    with pytest.raises(UserError, match="column 'targets': 'maybe' is no label"):
        task.response({"inputs": "as it is", "targets": "maybe"})


def test_unknown_name_becomes_a_task(tmp_path: Path) -> None:
    columns = {"prompt": "a", "query": "b", "response": "c"}
    content = {"mine": {"hf_hub_url": "me/mine", "instruction": "Do.", "columns": columns}}
    task = apply(tmp_path, content).tasks["mine"]
    folder = tmp_path / "data" / "mine"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text('{"a": "x", "b": "y", "c": 3}\n' * 2)
    row = data.splits(task, tmp_path / "data").test[0]
    assert (task.prompt(row), task.response(row)) == ("Do.\nx\ny", "3")
    assert (task.metric, task.labels) == ("exact_match", None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must be an object of entries by name, found a list"),
        ({"sst2": entry(ranking=True)}, "entry 'sst2': unknown field 'ranking'; known: hf_hub_url, subset"),
        (
            {"sst2": entry(columns={"prompt": "a", "response": "b", "history": "c"})},
            "entry 'sst2': unknown field 'columns.history'; known: prompt, query, response",
        ),
        ({"sst2": entry(columns={"prompt": "a"})}, "entry 'sst2': field 'columns.response': Field required"),
        ({"sst2": {"split": "train"}}, "entry 'sst2': field 'hf_hub_url': Field required"),
        ({"sst2": entry(split=3)}, "entry 'sst2': field 'split': Input should be a valid string"),
        ({"sst2": 3}, "entry 'sst2': "),
        ({"sst2_eval": entry()}, "entry 'sst2_eval' needs an entry 'sst2' to train"),
    ],
)
def test_bad_files_name_entry_and_field(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        apply(tmp_path, content)
    assert "dataset_info.json" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing.json cannot be read: No such file"):
        apply_tasks_file(TASKS, tmp_path / "nothing.json")


def test_published_file_with_its_quirks() -> None:
    if not PUBLISHED.is_file():
        pytest.skip("no published tasks file beside the checkout")
    tasks, warnings = apply_tasks_file(TASKS, PUBLISHED)
    assert set(tasks) == set(TASKS)
    published = json.loads(PUBLISHED.read_text())
    for task in PEFT_BENCH:
        laid = tasks[task.name]
        assert laid.instruction == published[task.name]["instruction"]
        assert laid.test_instruction == published[f"{task.name}_eval"]["instruction"]
        assert laid.splits.test[0] == published[f"{task.name}_eval"]["split"]
    assert tasks["winogrande"].instruction == "" and "winogrande: the instruction is empty" in warnings
    reworded = {text.split(":")[0] for text in warnings if text.endswith("worded differently")}
    assert reworded == {"winogrande", "copa", "siqa"}
