"""Recorded training steps: padding that changes nothing, one recording for many packs, honest failures."""

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from peftdyno.engine import step_graphs as graphs
from peftdyno.engine.accounting.ledger import Ledger
from peftdyno.engine.accounting.predict import Job
from peftdyno.engine.accounting.scope import Scope
from peftdyno.engine.adapters import METHODS
from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.adapters.method import Method
from peftdyno.engine.decoder import Decoder
from peftdyno.engine.errors import UserError
from peftdyno.engine.graphs import EagerRecorder, GraphChoice, Recorder
from peftdyno.engine.optim import AdamW, OptimConfig
from peftdyno.engine.pack import Pack, Sequence
from peftdyno.engine.pack_padding import PackSize, padded
from peftdyno.engine.recorded_steps import LEAST_TAPED, step_graphs
from peftdyno.engine.step_graphs import StepGraphs
from peftdyno.engine.step_tapes import StepTapes
from peftdyno.engine.tape import TapeRecorder, unavailable
from peftdyno.engine.train import TrainConfig, TrainState, forward_backward, train

from .banks import FORMS as FORMS_OF_ALL
from .banks import TinyModel, backward, pack_of, random_sequences, relative, shake, small_method
from .tiny_job import CONFIG as TINY
from .tiny_job import job, tiny_bank, tiny_decoder

needs_tape = pytest.mark.skipif(bool(unavailable()), reason="the C++ kernels, which replay tapes, are not built")
RECORDERS = [pytest.param(EagerRecorder(), id="again"), pytest.param(TapeRecorder(), marks=needs_tape, id="tape")]
ROUNDING = 2e-6
"""Relative: fp32 sums over as many terms in another order."""
FORMS = ["lora", "ia3", "ln-tuning", "prompt-tuning", "prefix-tuning", "p-tuning mlp", "svft everywhere", "adapter"]


@dataclass
class Counting:
    """Counts recordings."""

    recorder: Recorder = field(default_factory=EagerRecorder)
    count: int = 0

    def record(self, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.count += 1
        return self.recorder.record(call)


def batch(lengths: list[int], runs: int = 1, seed: int = 3) -> list[Sequence]:
    """Sequences of each run, of which those of later runs are shorter."""
    return [
        replace(s, weight=0.25)
        for run in range(runs)
        for s in random_sequences([n - run for n in lengths], run=run, seed=seed + run)
    ]


def results(bank: AdapterBank, losses: list[float]) -> tuple[list[float], Tensor]:
    return losses, bank.gradient.clone()


def agree(found: tuple[list[float], Tensor], expected: tuple[list[float], Tensor]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=ROUNDING)
    assert relative(found[1], expected[1]) < ROUNDING


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", ["llama", "gemma"])
def test_padding_changes_nothing(form: str, variant: str, request: pytest.FixtureRequest, poison: None) -> None:
    """Two runs, one of them with more rows, behind shared prefixes."""
    model: TinyModel = request.getfixturevalue(variant)
    bank = shake(model.bank(small_method(form), (1, 2)))
    pack = pack_of(bank, batch([9, 14, 6], 2), share_prefix=True)
    expected = results(bank, backward(model.decoder, bank, [pack], 5))
    size = PackSize.of(pack)
    wide = padded(pack, size)
    assert wide.num_tokens == 2 * size.rows > pack.num_tokens
    assert wide.layout.pairs() > pack.layout.pairs()
    agree(results(bank, backward(model.decoder, bank, [wide], 5)), expected)


def test_what_padding_repeats_is_of_the_pack(llama: TinyModel, poison: None) -> None:
    """A token that does not occur may have an embedding that is not finite, dropout or not."""
    bank = shake(llama.bank(small_method("lora"), (1,)))
    pack = pack_of(bank, batch([9, 14]))
    absent = next(t for t in range(len(llama.decoder.weights.embed)) if t not in pack.tokens.tolist())
    embed = llama.decoder.weights.embed.clone()
    embed[absent] = float("inf")
    embed[0] = float("nan") if 0 not in pack.tokens.tolist() else embed[0]
    decoder = Decoder(llama.config, replace(llama.decoder.weights, embed=embed, head=llama.decoder.weights.head))
    expected = results(bank, backward(llama.decoder, bank, [pack]))
    agree(results(bank, backward(decoder, bank, [padded(pack, PackSize.of(pack))])), expected)


def test_padding_rows_receive_zero(llama: TinyModel) -> None:
    """The gradient of every padding row of the embedding is zero to the bit, with dropout."""
    bank = shake(llama.bank(small_method("lora"), (1, 2)))
    pack = pack_of(bank, batch([9, 14], 2))
    wide = padded(pack, PackSize.of(pack))
    seen: list[Tensor] = []
    decoder = _Watched(llama.config, llama.decoder.weights)
    decoder.seen = seen
    backward(decoder, bank, [wide])
    live = wide.runs.streams.clone().fill_(0).bool()  # type: ignore[union-attr]
    for start, (a, b) in zip(
        wide.runs.offsets, zip(pack.runs.offsets, pack.runs.offsets[1:], strict=False), strict=False
    ):
        live[start : start + b - a] = True
    assert int(seen[0][live].any(1).sum()) == pack.num_tokens - 4, "the last token of a sequence predicts nothing"
    assert not seen[0][~live].any()


class _Watched(Decoder):
    """Notes the gradient of the embedded rows."""

    seen: list[Tensor]

    def embed(self, pack: Pack, bank: AdapterBank) -> Tensor:
        rows = super().embed(pack, bank).requires_grad_()
        rows.register_hook(self.seen.append)
        return rows


STEPS = [[batch([9, 14, 6], 2, seed)] for seed in (1, 2)] + [[batch([12, 8], 2, 3), batch([13], 2, 4)]]
"""Three steps: two of one micro-batch, one of two."""


def train_steps(
    model: TinyModel, form: str, share: bool, step: StepGraphs | None, bank: AdapterBank
) -> list[list[float]]:
    """AdamW over STEPS, recorded or not; losses by step and run, and the masters at the end."""
    optimizer, ledger, config = AdamW.create(bank), Ledger(Scope(), on=False), OptimConfig(learning_rate=1e-2)
    found = []
    for i, micro_batches in enumerate(STEPS):
        packs = [pack_of(bank, m, share_prefix=share) for m in micro_batches]
        losses, _ = forward_backward(model.decoder, bank, packs, i, ledger, step)
        optimizer.step(bank, [config] * 2, [1e-2] * 2, [1.0] * 2, [True] * 2)
        found.append(losses)
    return found


@pytest.mark.parametrize("recorder", RECORDERS)
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_replayed_steps_train_alike(form: str, share: bool, recorder: Recorder, llama: TinyModel) -> None:
    """Losses and masters of three steps of two runs; all packs of a kind by one recording."""
    plain, recorded = (shake(llama.bank(small_method(form), (1, 2))) for _ in range(2))
    recorder = Counting(recorder)
    step = StepGraphs(llama.decoder, recorded, recorder=recorder)
    expected = train_steps(llama, form, share, None, plain)
    found = train_steps(llama, form, share, step, recorded)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert relative(recorded.flat, plain.flat) < 1e-5
    assert recorder.count == len(step.recordings) < 4, "a recording serves several packs"
    assert max(r.num_checked for r in step.recordings.values()) == graphs.NUM_CHECKED


def test_dropout_follows_the_step(llama: TinyModel) -> None:
    """One pack at two steps: two masks, each that of the eager step."""
    bank = shake(llama.bank(small_method("lora"), (1,)))
    pack, ledger = pack_of(bank, batch([9, 14])), Ledger(Scope(), on=False)
    step = StepGraphs(llama.decoder, bank, recorder=EagerRecorder())
    found = [results(bank, forward_backward(llama.decoder, bank, [pack], i, ledger, step)[0]) for i in (0, 1, 2, 3)]
    for i, ours in enumerate(found):
        agree(ours, results(bank, forward_backward(llama.decoder, bank, [pack], i, ledger)[0]))
    assert relative(found[3][1], found[2][1]) > 1e-3


def test_a_larger_pack_makes_a_new_recording(llama: TinyModel) -> None:
    bank = shake(llama.bank(small_method("ia3"), (1,)))
    recorder, ledger = Counting(), Ledger(Scope(), on=False)
    step = StepGraphs(llama.decoder, bank, recorder=recorder)
    counts = []
    for lengths in ([9, 14], [12, 9], [60, 30], [14, 9], [50, 35]):
        pack = pack_of(bank, batch(lengths))
        found = results(bank, forward_backward(llama.decoder, bank, [pack], 1, ledger, step)[0])
        counts.append(recorder.count)
        agree(found, results(bank, forward_backward(llama.decoder, bank, [pack], 1, ledger)[0]))
    assert counts == [1, 1, 2, 2, 2]


def test_runs_that_ended_take_no_rows(llama: TinyModel) -> None:
    bank = shake(llama.bank(small_method("prompt-tuning"), (1, 2)))
    pack = pack_of(bank, batch([9, 14]))
    size = PackSize.of(pack)
    assert size.takes_part == (True, False) and size.offsets(size.rows) == (0, 64, 64) and size.virtual == 5
    expected = results(bank, backward(llama.decoder, bank, [pack]))
    agree(results(bank, backward(llama.decoder, bank, [padded(pack, size)])), expected)
    assert not bank.gradient[1].any()


def test_the_recording_not_used_for_longest_goes(llama: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST_RECORDINGS", 2)
    bank = llama.bank(small_method("ia3"), (1,))
    step, ledger = StepGraphs(llama.decoder, bank, recorder=EagerRecorder()), Ledger(Scope(), on=False)
    for lengths in ([9], [70], [9], [9], [100], [70]):
        forward_backward(llama.decoder, bank, [pack_of(bank, batch(lengths))], 0, ledger, step)
    assert [size.rows for size in step.recordings] == [128, 96]


class Twice(EagerRecorder):
    """A replay that computes twice what it should."""

    def record(self, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def again() -> Tensor:
            call()
            return call()

        return again


@dataclass
class Stale(EagerRecorder):
    """A replay right for the first pack that goes on to give the first one's results."""

    def record(self, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        kept: list[Tensor] = []

        def again() -> Tensor:
            out = call()
            kept.append(out.clone())
            return out.copy_(kept[0])

        return again


@pytest.mark.parametrize("recorder", [Twice, Stale])
def test_a_replay_that_differs_is_reported(recorder: type[EagerRecorder], llama: TinyModel) -> None:
    """An error where graphs were asked for; else one warning, and the step's results are those of the eager one."""
    ledger = Ledger(Scope(), on=False)
    for choice in ("on", "auto"):
        bank = shake(llama.bank(small_method("lora"), (1, 2)))
        packs = [pack_of(bank, batch([9, 14], 2, seed)) for seed in (1, 2)]
        step = StepGraphs(llama.decoder, bank, choice, recorder=recorder())  # type: ignore[arg-type]
        if choice == "on":
            with (
                warnings.catch_warnings(),
                pytest.raises(UserError, match=r"--graphs on: .*differs from the eager step"),
            ):
                forward_backward(llama.decoder, bank, packs, 2, ledger, step)
            continue
        with pytest.warns(UserWarning, match="goes on without recorded steps") as told:
            found = results(bank, forward_backward(llama.decoder, bank, packs, 2, ledger, step)[0])
        assert len(told) == 1 and "differs" in step.complaint and not step.recordings
        agree(found, results(bank, forward_backward(llama.decoder, bank, packs, 2, ledger)[0]))


def test_training_says_that_it_goes_on_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the loop: the event stands in the state once, and the losses are those without graphs."""

    def run(name: str, choice: GraphChoice | Recorder) -> list[str]:
        decoder = tiny_decoder()
        state = train(decoder, tiny_bank(decoder), [job(steps=6)], TrainConfig(graphs=choice), tmp_path / name)
        return state.events

    plain = run("plain", "off")
    recorder = Counting()
    assert run("recorded", recorder) == plain == [] and recorder.count > 0
    monkeypatch.setattr(
        "peftdyno.engine.train.step_graphs",
        lambda choice, decoder, bank, _: StepGraphs(decoder, bank, "auto", recorder=Twice()),
    )
    with pytest.warns(UserWarning, match="without recorded steps"):
        assert [e.split(":")[0] for e in run("given up", "auto")] == ["training goes on without recorded steps"]
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("plain", "given up")]
    assert lines[0] == lines[1]


def test_counted_steps_count_what_is_not_padded(llama: TinyModel) -> None:
    """The counts are those of the eager step, the results those of the replay, and no pack is seen twice."""
    bank = llama.bank(small_method("ia3"), (1,))
    counted, plain = (Ledger.of(llama.decoder, bank) for _ in range(2))
    step, uncounted = StepGraphs(llama.decoder, bank, recorder=EagerRecorder()), Ledger(Scope(), on=False)
    pack = pack_of(bank, batch([9, 14]))
    found = results(bank, forward_backward(llama.decoder, bank, [pack], 0, counted, step)[0])
    expected = results(bank, forward_backward(llama.decoder, bank, [pack], 0, uncounted, step)[0])
    assert found[0] == expected[0] and torch.equal(found[1], expected[1])
    forward_backward(llama.decoder, bank, [pack], 0, plain)
    for ledger in (counted, plain):
        ledger.end_step()
    assert counted.counter is not None and plain.counter is not None
    assert counted.counter.tally.total() == plain.counter.tally.total()
    assert counted.sampled == [0] and counted.tokens == [23]
    forward_backward(llama.decoder, bank, [pack], 1, counted, step)
    counted.end_step()
    assert counted.tokens == [23, 23] and set(counted.clock.read()[0]) == {"backward"}


@pytest.mark.parametrize(
    ("graphs", "seeds"),
    [
        pytest.param(EagerRecorder(), (0, 1), id="again"),
        pytest.param("on", (0,), marks=needs_tape, id="tape"),
        pytest.param("on", (0, 1), marks=needs_tape, id="tape-of-two"),
    ],
)
def test_a_killed_training_ends_with_the_same_bits(graphs: Any, seeds: tuple[int, ...], tmp_path: Path) -> None:
    """Recorded anew after each kill, and its first step counted again: packs of several sizes, dropout, one run or
    two. On a CPU a step is computed to the same bits with a recording and without."""

    def run(name: str, *kills: int) -> tuple[TrainState, str]:
        state = None
        for kill in (*kills, None):
            decoder = tiny_decoder()
            bank = tiny_bank(decoder, seeds)
            ledger, config = Ledger.of(decoder, bank), TrainConfig(graphs=graphs, save_every=0.1)

            def after(done: int, *_: object) -> None:
                if done == kill:  # noqa: B023
                    raise KeyboardInterrupt

            data = [job(steps=20, batch=3, seed=seed) for seed in seeds]
            with contextlib.suppress(KeyboardInterrupt):
                state = train(decoder, bank, data, config, tmp_path / name, ledger=ledger, progress=after)
        assert state is not None
        return state, (tmp_path / name / "metrics.jsonl").read_text()

    (whole, lines), (killed, again) = run("whole"), run("killed", 3, 11, 18)
    assert lines == again and torch.equal(whole.bank.flat, killed.bank.flat) and whole.events == killed.events == []


def test_auto_leaves_large_packs_alone(llama: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = llama.bank(small_method("ia3"), (1,))
    step = StepGraphs(llama.decoder, bank, "auto", recorder=EagerRecorder())
    small, large = (pack_of(bank, batch(lengths)) for lengths in ([9], [90]))
    layer = llama.decoder.weights.layers[0]
    weights = sum(w.shape[0] * w.shape[1] for w in (layer.qkv, layer.o, layer.gate_up, layer.down))
    monkeypatch.setattr(graphs, "MOST_FLOPS", 4 * 64 * weights)
    assert step.takes([small, small]) and not step.takes([small, large])


@needs_tape
def test_choices(llama: TinyModel) -> None:
    bank = llama.bank(small_method("lora"), (1,))
    assert step_graphs("off", llama.decoder, bank, LEAST_TAPED) is None
    assert step_graphs("auto", llama.decoder, bank, LEAST_TAPED - 1) is None
    two = llama.bank(small_method("lora"), (1, 2))
    for choice, given, num_steps in (("on", bank, 1), ("auto", bank, LEAST_TAPED), ("auto", two, LEAST_TAPED)):
        steps = step_graphs(choice, llama.decoder, given, num_steps)  # type: ignore[arg-type]
        assert isinstance(steps, StepTapes)
    with pytest.raises(UserError, match="--graphs"):
        step_graphs("always", llama.decoder, bank, 100)  # type: ignore[arg-type]
    cheap = Decoder(llama.config, llama.decoder.weights, activations="cheap")
    with pytest.raises(UserError, match="--activations cheap cannot be recorded; give --activations keep"):
        step_graphs(EagerRecorder(), cheap, bank, 100)


class FromHost(TorchFunctionMode):
    """Notes what Python puts on the device, or reads from it, while it is entered; `meta` stands for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        there = isinstance(result, Tensor) and result.is_meta
        given = [a for a in args if isinstance(a, Tensor)]
        made = func in (torch.tensor, torch.as_tensor, torch.from_numpy)
        moved = func in (Tensor.to, Tensor.copy_) and any(not a.is_meta for a in given)
        read = func in (Tensor.item, Tensor.tolist, Tensor.cpu) and any(a.is_meta for a in given)
        if (there and (made or moved)) or read:
            self.found.append(func.__name__)
        return result


def taken_from_host(method: Method) -> list[str]:
    """What a recorded step of two runs takes from the host, beside what is put into its buffers."""
    job = Job(config=TINY, methods=(method, method), dtype=torch.bfloat16, device="cuda")
    decoder, bank = job.model(Scope())
    steps = StepGraphs(decoder, bank, recorder=EagerRecorder())
    pack = pack_of(bank, batch([9, 14], 2), share_prefix=True)
    size = PackSize.of(pack)
    recording = graphs.Recording.of(padded(pack, size), size, decoder.device)
    with FromHost() as mode:
        steps.run(recording.pack)
    return mode.found


@pytest.mark.parametrize("form", [form for form in FORMS_OF_ALL if not small_method(form).unrecordable()])
def test_what_is_recorded_takes_nothing_from_the_host(form: str) -> None:
    """A CUDA graph would repeat the copy of the step that was recorded."""
    assert taken_from_host(small_method(form)) == []


@pytest.mark.parametrize(
    ("name", "options", "by"),
    [("lora", {"dora": True}, "tensor"), ("lora", {"lora_bias": True}, "tensor"), ("svft", {}, "to")],
)
def test_copies_from_the_host_would_be_seen(name: str, options: dict, by: str) -> None:
    assert by in taken_from_host(METHODS[name](**options))


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("lora", {"dora": True}, "DoRA"),
        ("lora", {"lora_bias": True}, "lora_bias"),
        ("p-tuning", {"num_virtual_tokens": 4, "hidden_size": 16}, "LSTM"),
        ("svft", {}, "SVFT"),
    ],
)
def test_methods_that_read_the_host_are_named(name: str, options: dict, reason: str, llama: TinyModel) -> None:
    bank = llama.bank(METHODS[name](**options), (1,))
    with pytest.raises(UserError, match=f"--graphs on: .*{reason}.*; give --graphs auto or off"):
        step_graphs(EagerRecorder(), llama.decoder, bank, 100)
