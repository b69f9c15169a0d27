"""Every task: its golden rendering, its declaration, and each row of the real data where it lies beside."""

import json
from pathlib import Path

import pytest

from peftdyno.bench import data, row_files
from peftdyno.bench.task import SplitNames, Task, cell
from peftdyno.bench.tasks import PEFT_BENCH, TASKS, get_task
from peftdyno.bench.tasks.generated import NUM_ROWS
from peftdyno.bench.tasks.table import table
from peftdyno.engine.errors import UserError

ROOT = Path(__file__).parents[2]
GOLDEN = json.loads((Path(__file__).parent / "golden" / "tasks.json").read_text())
REAL = ROOT.parent / "shared" / "data"
LABEL_ORDER = {
    "mnli": "entailment neutral contradiction",
    "qqp": "not_duplicate duplicate",
    "qnli": "entailment not_entailment",
    "sst2": "negative positive",
    "mrpc": "not_equivalent equivalent",
    "rte": "entailment not_entailment",
    "cola": "unacceptable acceptable",
    "multirc": "false true",
    "boolq": "false true",
    "wic": "false true",
    "wsc": "false true",
    "cb": "entailment contradiction neutral",
    "copa": "choice1 choice2",
    "mmlu": "A B C D",
    "piqa": "solution1 solution2",
    "siqa": "A B C",
    "hellaswag": "ending1 ending2 ending3 ending4",
    "winogrande": "option1 option2",
    "openbookqa": "A B C D",
    "math_qa": "a b c d e",
}


@pytest.mark.parametrize("name", TASKS)
def test_golden(name: str) -> None:
    golden = GOLDEN[name]
    assert TASKS[name].prompt(golden["row"]) == golden["prompt"]
    assert TASKS[name].prompt(golden["row"], "test") == golden["prompt"]
    assert TASKS[name].response(golden["row"]) == golden["response"]
    assert golden["response"] in TASKS[name].answers(golden["row"])


def test_golden_has_no_leftovers() -> None:
    assert set(GOLDEN) == set(TASKS)


def test_benchmark_is_complete() -> None:
    assert len(PEFT_BENCH) == 27
    assert {task.name: " ".join(task.labels) for task in PEFT_BENCH if task.labels} == LABEL_ORDER


def test_labels_fit_published_scoring() -> None:
    assert all(len(label) <= 16 for task in TASKS.values() for label in task.labels or ())


def test_docs_have_the_table() -> None:
    hint = "docs/tasks.md is behind: paste `python -m peftdyno.bench.tasks.table`"
    assert table() in (ROOT / "docs" / "tasks.md").read_text(), hint


def test_declarations_are_plain() -> None:
    for task in TASKS.values():
        assert json.loads(json.dumps(task.declaration()))["name"] == task.name


@pytest.mark.parametrize("name", [task for task in TASKS if TASKS[task].generate is None])
def test_real_rows(name: str) -> None:
    if not (REAL / name).is_dir():
        pytest.skip(f"no real rows of {name} beside the checkout")
    for split in row_files.split_files(REAL / name):
        loaded = data.load_rows(TASKS[name], split, REAL)
        assert loaded.source.dropped == 0
        for row in loaded.rows[:50]:
            assert TASKS[name].prompt(row).startswith(TASKS[name].instruction + "\n")
            assert TASKS[name].response(row).strip()


def test_unknown_name_suggests() -> None:
    with pytest.raises(UserError, match=r"unknown task 'sst'; did you mean .*sst2"):
        get_task("sst")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sst2", {"sentence": None}, "column 'sentence' must be text, found NoneType"),
        ("sst2", {"label": -1}, r"column 'label': label -1 is out of range 0\.\.1"),
        ("sst2", {"label": 2}, r"label 2 is out of range 0\.\.1"),
        ("sst2", {"label": True}, "column 'label' must be a class number, found 'True'"),
        ("sst2", {"label": 0.5}, "must be a class number"),
        ("siqa", {"label": "4"}, r"label 4 is out of range 1\.\.3"),
        ("siqa", {"label": ""}, "must be a class number"),
        ("math_qa", {"correct": "f"}, r"column 'correct': 'f' is no label \(a, b, c, d, e\)"),
        ("stsb", {"label": 5.5}, r"score 5.5 is out of range 0\.\.5"),
        ("stsb", {"label": float("nan")}, "must be a number"),
        ("mmlu", {"choices": ["a", "b"]}, "column 'choices' must be a list of 4 texts"),
        ("record", {"answers": []}, "column 'answers': the answer is empty"),
        ("wsc", {"span1_index": 99}, "column 'span1_index': 99 is not one of"),
        ("wsc", {"span2_text": "he"}, "column 'span2_text': 'he' does not stand at word 6"),
        ("copa", {"question": "why"}, "column 'question' must be 'cause' or 'effect'"),
        ("sst2", {"sentence": "bad \ud800 text"}, "column 'sentence' has half of a surrogate pair"),
        ("apps", {"solutions": "[1"}, "column 'solutions' is not JSON"),
        ("gsm8k", {"answer": " "}, "column 'answer': the answer is empty"),
    ],
)
def test_bad_values_name_the_column(name: str, change: dict, message: str) -> None:
    row = GOLDEN[name]["row"] | change
    with pytest.raises(UserError, match=message):
        TASKS[name].prompt(row)
        TASKS[name].response(row)


@pytest.mark.parametrize("name", TASKS)
def test_each_missing_column_is_named(name: str) -> None:
    """Dropping any column either changes nothing or is an error that names it."""
    task, row = TASKS[name], GOLDEN[name]["row"]
    missed = 0
    for column in row:
        rest = {other: value for other, value in row.items() if other != column}
        try:
            assert task.prompt(rest) == GOLDEN[name]["prompt"]
            assert task.response(rest) == GOLDEN[name]["response"]
        except UserError as error:
            assert f"'{column}' is missing; the row has: " in str(error)
            missed += 1
    assert missed >= 2


def test_empty_row_is_named() -> None:
    with pytest.raises(UserError, match="column 'x' is missing; the row has: no columns"):
        cell({}, "x")


def test_wording_may_differ_for_test_and_be_empty() -> None:
    task = Task(
        name="t",
        category="own",
        metric="exact_match",
        instruction="",
        test_instruction="Say it.",
        inputs=("a", "b"),
        target="c",
        splits=SplitNames(),
    )
    assert task.prompt({"a": "1", "b": "2"}) == "1\n2"
    assert task.prompt({"a": "1", "b": "2"}, "test") == "Say it.\n1\n2"


@pytest.mark.parametrize("name", ["gen-order", "gen-extract"])
def test_generated_rows(name: str) -> None:
    task = TASKS[name]
    train, test = task.generate("train"), task.generate("test")
    assert (len(train), len(test)) == (NUM_ROWS["train"], NUM_ROWS["test"])
    prompts = [{task.prompt(row) for row in rows} for rows in (train, test)]
    assert len(prompts[0]) > 0.99 * len(train) and len(prompts[1]) > 0.99 * len(test)
    assert not prompts[0] & prompts[1]
    assert task.generate("test") == test


def test_generated_answers_hold_out_what_test_asks() -> None:
    """No (goods, city) answered in test is answered in train."""
    asked = [
        {row["answer"].split(" | ", 1)[1] for row in TASKS["gen-extract"].generate(split)}
        for split in ("train", "test")
    ]
    assert not asked[0] & asked[1]
    assert len(asked[1]) >= 20


def test_generated_order_is_balanced_and_true() -> None:
    from peftdyno.bench.tasks.generated import ANIMALS, COLOURS

    rows = TASKS["gen-order"].generate("test")
    assert 0.4 < sum(row["label"] for row in rows) / len(rows) < 0.6
    for row in rows:
        words = row["text"].lower().replace(".", " ").replace(",", " ").replace(";", " ").split()
        animal = next(place for place, word in enumerate(words) if word in ANIMALS)
        colour = next(place for place, word in enumerate(words) if word in COLOURS)
        assert row["label"] == int(colour < animal)
