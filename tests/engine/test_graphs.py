"""Recorded decoding: buckets, padding that changes nothing, buffers that are read where they lie, honest failures."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from peftdyno.engine import graphs
from peftdyno.engine.cache import KVCache
from peftdyno.engine.errors import UserError
from peftdyno.engine.generate import generate
from peftdyno.engine.graphs import LEAST_TAPED, EagerRecorder, Recorder, bucket, recorder_for
from peftdyno.engine.pack import Sequence
from peftdyno.engine.tape import TapeRecorder, unavailable
from peftdyno.kernels import replay

from .banks import TinyModel, random_sequences, shake, small_method

CPU = torch.device("cpu")
needs_tape = pytest.mark.skipif(bool(unavailable()), reason="the C++ kernels, which replay tapes, are not built")
RECORDERS = [pytest.param(EagerRecorder(), id="again"), pytest.param(TapeRecorder(), marks=needs_tape, id="tape")]


@dataclass
class Counting:
    """Notes the number of rows of each recording and counts replays."""

    recorder: Recorder = field(default_factory=EagerRecorder)
    rows: list[int] = field(default_factory=list)
    replays: int = 0

    def record(self, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        again = self.recorder.record(call)
        self.rows.append(len(call()))

        def counted() -> Tensor:
            self.replays += 1
            return again()

        return counted


def test_buckets_waste_less_than_half() -> None:
    found = [bucket(n) for n in range(40)]
    assert sorted(set(found)) == [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48]
    assert all(n <= width < 1.5 * n + 1 for n, width in enumerate(found))


def prompts_of(runs: int, per_run: int) -> list[Sequence]:
    lengths = [9, 4, 6, 5, 11][:per_run]
    return [s for run in range(runs) for s in random_sequences(lengths, run=run, seed=5 + run)]


@pytest.mark.parametrize("recorder", RECORDERS)
@pytest.mark.parametrize("form", ["lora", "ia3", "prefix-tuning", "prompt-tuning"])
@pytest.mark.parametrize("variant", ["llama", "gemma"])
def test_replayed_steps_give_the_same_tokens(
    form: str, variant: str, recorder: Recorder, request: pytest.FixtureRequest
) -> None:
    """Two runs of five prompts, padded to buckets; sequences end at different steps."""
    model: TinyModel = request.getfixturevalue(variant)
    bank = shake(model.bank(small_method(form), (1, 2)))
    prompts = prompts_of(2, 5)
    whole = generate(model.decoder, bank, prompts, max_new_tokens=9, eos_ids=(), graphs="off")
    ends = {whole[0][2], whole[6][5]}
    expected = generate(model.decoder, bank, prompts, max_new_tokens=9, eos_ids=ends, graphs="off")
    assert len({len(tokens) for tokens in expected}) > 1
    recorder = Counting(recorder)
    assert generate(model.decoder, bank, prompts, max_new_tokens=9, eos_ids=ends, graphs=recorder) == expected
    live = [sum(len(tokens) > 0 for tokens in expected[5 * run : 5 * run + 5]) for run in range(2)]
    assert recorder.rows[0] == sum(map(bucket, live))
    assert len(recorder.rows) < recorder.replays, "a recording serves several steps"


def test_a_step_is_copied_in_one_piece(llama: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the rows that are read of its logits."""
    puts: list[Tensor] = []
    fills: list[Tensor] = []
    put, fill = replay.put, graphs._Recording.fill
    monkeypatch.setattr(replay, "put", lambda target, source: (puts.append(target), put(target, source))[1])

    def filled(self: graphs._Recording, cache: KVCache, step: graphs.Step) -> Tensor:
        fills.append(fill(self, cache, step))
        assert fills[-1].untyped_storage().data_ptr() == self.inputs.untyped_storage().data_ptr()
        return fills[-1]

    monkeypatch.setattr(graphs._Recording, "fill", filled)
    bank = llama.bank(small_method("lora"), (1,))
    generate(llama.decoder, bank, prompts_of(1, 3), max_new_tokens=4, eos_ids=(), graphs=EagerRecorder())
    assert len(puts) == len(fills) > 3


def test_a_recording_is_kept_while_half_of_it_is_used() -> None:
    """Live sequences of two runs against the recordings there are."""
    recorded = graphs.DecodeGraphs.__new__(graphs.DecodeGraphs)
    recorded.recordings = {(8, 8): "wide", (4, 3): "narrow"}  # type: ignore[dict-item]
    recorded.pack = type("Two", (), {"num_runs": 2})()  # type: ignore[assignment]
    made: list[tuple[int, ...]] = []
    recorded._prepared = lambda own, step: made.append(own) or "new"  # type: ignore[assignment, method-assign]

    def chosen(*counts: int) -> str:
        runs = [run for run, count in enumerate(counts) for _ in range(count)]
        return str(recorded._recorded(graphs.Step(range(len(runs)), runs, runs, runs, runs)))

    assert chosen(8, 8) == chosen(5, 4) == "wide" and chosen(4, 3) == chosen(2, 2) == "narrow"
    assert chosen(1, 1) == "new" and made == [(1, 1)]
    assert chosen(9, 1) == "new" and made == [(1, 1), (12, 1)]


class Wrong(EagerRecorder):
    """A replay that gives something else."""

    def record(self, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return lambda: call() + 1.0


def test_a_replay_that_differs_is_an_error(llama: TinyModel) -> None:
    bank = llama.bank(small_method("lora"), (1,))
    with pytest.raises(RuntimeError, match="differs from the step it repeats"):
        generate(llama.decoder, bank, prompts_of(1, 2), max_new_tokens=4, eos_ids=(), graphs=Wrong())


def test_auto_goes_on_without_graphs_and_says_so(llama: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = llama.bank(small_method("lora"), (1,))
    plain = generate(llama.decoder, bank, prompts_of(1, 2), max_new_tokens=4, eos_ids=(), graphs="off")
    monkeypatch.setattr("peftdyno.engine.generate.recorder_for", lambda *_: Wrong())
    with pytest.warns(UserWarning, match="without recorded steps"):
        assert generate(llama.decoder, bank, prompts_of(1, 2), max_new_tokens=4, eos_ids=()) == plain
    with warnings.catch_warnings(), pytest.raises(RuntimeError):
        generate(llama.decoder, bank, prompts_of(1, 2), max_new_tokens=4, eos_ids=(), graphs="on")


def test_choices() -> None:
    assert recorder_for("auto", CPU, LEAST_TAPED - 1) is None and recorder_for("off", CPU, LEAST_TAPED) is None
    assert recorder_for("on", torch.device("meta"), LEAST_TAPED) is None
    with pytest.raises(UserError, match="--graphs"):
        recorder_for("always", CPU, 100)  # type: ignore[arg-type]


@needs_tape
def test_a_tape_is_made_where_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(recorder_for("on", CPU, 1), TapeRecorder)
    assert isinstance(recorder_for("auto", CPU, LEAST_TAPED), TapeRecorder)
    monkeypatch.setattr("peftdyno.kernels.cpu.AVAILABLE", False)
    with pytest.raises(UserError, match="install with a C\\+\\+ compiler and give --kernels auto, or --graphs off"):
        recorder_for("on", CPU, LEAST_TAPED)
    assert recorder_for("auto", CPU, LEAST_TAPED) is None


def test_all_recordings_are_made_on_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of stand-ins: what runs before the graph and what is captured."""
    streams: list[MagicMock] = []
    cuda = MagicMock(Stream=lambda device: streams.append(MagicMock()) or streams[-1])
    monkeypatch.setattr(graphs.torch, "cuda", cuda)
    graphs._recording_stream.cache_clear()
    for recorder in (graphs.CudaRecorder(), graphs.CudaRecorder()):
        for _ in range(2):
            recorder.record(lambda: torch.zeros(1))
    graphs._recording_stream.cache_clear()
    assert len(streams) == 1
    used = [call.args[0] for call in cuda.stream.call_args_list]
    used += [call.kwargs["stream"] for call in cuda.graph.call_args_list]
    assert used == [streams[0]] * 8
