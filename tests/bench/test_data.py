"""Rows from folders, generators and a stand-in for the hub; splits; and every way a file can be bad."""

import gzip
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from peftdyno.bench import data
from peftdyno.bench.tasks import TASKS
from peftdyno.engine.errors import UserError

SST2 = TASKS["sst2"]


def sst2_rows(count: int) -> list[dict]:
    return [{"sentence": f"film {number}", "label": number % 2, "idx": number} for number in range(count)]


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "sst2" / "train.jsonl.gz", sst2_rows(100))
    write(tmp_path / "sst2" / "validation.jsonl", sst2_rows(20))
    return tmp_path


def test_reads_the_three_forms_alike(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    write(tmp_path / "sst2" / "a.jsonl", sst2_rows(5))
    write(tmp_path / "sst2" / "b.jsonl.gz", sst2_rows(5))
    parquet.write_table(pyarrow.Table.from_pylist(sst2_rows(5)), tmp_path / "sst2" / "c.parquet")
    assert all(data.load_rows(SST2, split, tmp_path).rows == sst2_rows(5) for split in "abc")


def test_source_says_where_from(folder: Path) -> None:
    source = data.load_rows(SST2, "train", folder).source
    path = folder / "sst2" / "train.jsonl.gz"
    assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (source.origin, source.location, source.rows, source.dropped) == ("file", str(path), 100, 0)
    assert json.loads(json.dumps(source.as_dict()))["split"] == "train"


def test_a_tenth_of_train_validates(folder: Path) -> None:
    splits = data.splits(SST2, folder, seed=7)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (90, 10, 20)
    numbers = [row["idx"] for row in splits.train] + [row["idx"] for row in splits.validation]
    assert sorted(numbers) == list(range(100))
    assert splits.test == sst2_rows(20)
    assert splits.sources["test"].split == "validation"


def test_seed_decides_the_division(folder: Path) -> None:
    one, again, other = (data.splits(SST2, folder, seed).validation for seed in (1, 1, 2))
    assert one == again != other


def test_division_is_pinned() -> None:
    """Runs of other days and machines must see the same split."""
    assert data.permutation(10, 42).tolist() == [2, 4, 5, 0, 9, 8, 1, 7, 3, 6]


def test_limits_sample_without_moving_the_division(folder: Path) -> None:
    whole = data.splits(SST2, folder, seed=3)
    some = data.splits(SST2, folder, seed=3, train_limit=8, validation_limit=4, test_limit=5)
    assert (len(some.train), len(some.validation), len(some.test)) == (8, 4, 5)
    assert all(row in whole.train for row in some.train)
    assert all(row in whole.validation for row in some.validation)
    assert some.test == data.splits(SST2, folder, seed=4, test_limit=5).test
    assert some.train != data.splits(SST2, folder, seed=4, train_limit=8).train
    assert some.sources["train"].rows == 100


def test_own_validation_split_is_used(tmp_path: Path) -> None:
    rows = [{"text": f"play {number}", "label": number % 7} for number in range(30)]
    for split, part in (("train", rows[:20]), ("validation", rows[20:25]), ("test", rows[25:])):
        write(tmp_path / "snips" / f"{split}.jsonl", part)
    splits = data.splits(TASKS["snips"], tmp_path)
    assert (splits.train, splits.validation, splits.test) == (rows[:20], rows[20:25], rows[25:])


def test_second_test_split_serves_and_is_reported(tmp_path: Path) -> None:
    row = {"premise": "a", "hypothesis": "b", "label": 0}
    write(tmp_path / "mnli" / "validation_matched.jsonl", [row])
    assert data.load_test(TASKS["mnli"], tmp_path).source.split == "validation_matched"
    write(tmp_path / "mnli" / "validation_mismatched.jsonl", [row])
    assert data.load_test(TASKS["mnli"], tmp_path).source.split == "validation_mismatched"


def test_unusable_rows_are_counted(tmp_path: Path) -> None:
    row = {"question": "q", "starter_code": "", "solutions": '["print(1)"]'}
    write(tmp_path / "apps" / "test.jsonl", [row, row | {"solutions": ""}, row | {"solutions": "[]"}])
    source = data.load_test(TASKS["apps"], tmp_path).source
    assert (source.rows, source.dropped) == (1, 2)


@pytest.mark.parametrize("name", ["gen-order", "gen-extract"])
def test_generated_splits_share_no_row(name: str) -> None:
    splits = data.splits(TASKS[name], seed=5)
    parts = [{json.dumps(row) for row in part} for part in (splits.train, splits.validation, splits.test)]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert splits.sources["test"].origin == "generator"


def test_generated_rows_are_pinned() -> None:
    """Scores are comparable only while the rows stay the same; a change needs a new task name."""
    sums = {
        (name, split): data.load_rows(TASKS[name], split).source.sha256[:16]
        for name in ("gen-order", "gen-extract")
        for split in ("train", "test")
    }
    assert sums == {
        ("gen-order", "train"): "917a14cbdcd42323",
        ("gen-order", "test"): "8c25f1bdd8c7a107",
        ("gen-extract", "train"): "b5a30f32d3ae999e",
        ("gen-extract", "test"): "18105f5978ead502",
    }


@pytest.mark.parametrize(
    ("files", "split", "message"),
    [
        ({}, "train", "has no folder 'sst2'; it has: none"),
        ({"sst/train.jsonl": b"{}"}, "train", "has no folder 'sst2'; close: sst; it has: sst"),
        ({"sst2/dev.jsonl": b"{}"}, "train", "has no split 'train'; the splits there: dev"),
        ({"sst2/notes.txt": b""}, "train", r"the splits there: none \(expected train.jsonl"),
        ({"sst2/train.jsonl": b"{}", "sst2/train.jsonl.gz": b""}, "train", "'train' is there twice"),
        ({"sst2/train.jsonl": b""}, "train", "split 'train' of task 'sst2' has no usable row"),
        ({"sst2/train.jsonl": b'\n{"sentence": }\n'}, "train", "train.jsonl row 2: not JSON"),
        ({"sst2/train.jsonl": b"[1]\n"}, "train", "train.jsonl row 1: expected an object .* found list"),
        ({"sst2/train.jsonl": b"[" * 100_000}, "train", "row 1: not JSON"),
        ({"sst2/train.jsonl": b'{"a": "\xff"}'}, "train", "row 1: not UTF-8"),
        ({"sst2/train.jsonl": b'{"label": 1}'}, "train", "row 1: column 'sentence' is missing"),
        ({"sst2/train.jsonl.gz": b"plain"}, "train", r"row 1: cannot be read \(Not a gzipped file"),
        ({"sst2/train.parquet": b"plain"}, "train", "train.parquet: cannot be read as Parquet"),
    ],
)
def test_bad_files_are_one_line(tmp_path: Path, files: dict, split: str, message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        data.load_rows(SST2, split, tmp_path)
    assert "\n" not in str(caught.value)


def test_truncated_gzip_names_the_row(folder: Path) -> None:
    path = folder / "sst2" / "train.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(UserError, match=r"train.jsonl.gz row \d+: cannot be read .* is it whole\?"):
        data.load_rows(SST2, "train", folder)


def test_damaged_gzip_names_the_file(folder: Path) -> None:
    path = folder / "sst2" / "train.jsonl.gz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 40] = bytes(40)
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"train.jsonl.gz row \d+: "):
        data.load_rows(SST2, "train", folder)


def test_bad_label_names_its_line(tmp_path: Path) -> None:
    write(tmp_path / "sst2" / "train.jsonl", [*sst2_rows(3), {"sentence": "x", "label": -1}])
    with pytest.raises(UserError, match=r"train.jsonl row 4: column 'label': label -1 is out of range"):
        data.load_rows(SST2, "train", tmp_path)


def test_no_such_folder_and_no_test_split(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data folder .*nowhere does not exist"):
        data.load_rows(SST2, "train", tmp_path / "nowhere")
    write(tmp_path / "mnli" / "train.jsonl", [])
    with pytest.raises(UserError, match=r"no test split \(validation_mismatched or validation_matched\).*train"):
        data.load_test(TASKS["mnli"], tmp_path)


def test_seed_has_a_range(folder: Path) -> None:
    with pytest.raises(UserError, match="seed -1 must be in"):
        data.splits(SST2, folder, seed=-1)


@pytest.mark.parametrize("limit", [0, -1])
def test_limits_are_positive(folder: Path, limit: int) -> None:
    with pytest.raises(UserError, match=f"train limit {limit} must be at least 1"):
        data.splits(SST2, folder, train_limit=limit)


def test_one_row_cannot_be_divided(tmp_path: Path) -> None:
    write(tmp_path / "sst2" / "train.jsonl", sst2_rows(1))
    with pytest.raises(UserError, match="needs at least 2 train rows"):
        data.splits(SST2, tmp_path)


def test_generator_knows_its_splits() -> None:
    with pytest.raises(UserError, match="generated task 'gen-order' has no split 'validation'"):
        data.load_rows(TASKS["gen-order"], "validation")


def test_hub_is_asked_without_remote_code(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*args: object, **options: object) -> list[dict]:
        asked.append((args, options))
        return sst2_rows(4)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = data.load_rows(SST2, "train")
    assert asked == [(("nyu-mll/glue", "sst2"), {"split": "train"})]
    assert (loaded.source.origin, loaded.source.location) == ("hub", "nyu-mll/glue/sst2/train")
    assert loaded.rows == sst2_rows(4)


def test_hub_failure_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load_dataset(*args: object, **options: object) -> None:
        raise ConnectionError("no route\nlong traceback")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"^hub data set .* \(no route\); give its rows with --data DIR$"):
        data.load_rows(SST2, "train")


def test_task_without_hub_asks_for_data() -> None:
    with pytest.raises(UserError, match="'snips' has no data set on the hub; give its rows with --data DIR"):
        data.load_rows(TASKS["snips"], "train")


def test_import_is_light() -> None:
    heavy = "{'datasets', 'pandas', 'pyarrow', 'transformers', 'sklearn', 'scipy', 'torch'}"
    modules = "peftdyno.bench.data, peftdyno.bench.metrics, peftdyno.bench.tasks, peftdyno.bench.tasks_file"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, {modules}; print(sorted({heavy} & set(sys.modules)))"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
