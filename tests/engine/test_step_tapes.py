"""Steps replayed from tapes: the same bits with a recording and without, checked by what costs no second gradient."""

import pytest
import torch

from peftdyno.engine import step_tapes
from peftdyno.engine.accounting.ledger import Ledger
from peftdyno.engine.accounting.scope import Scope
from peftdyno.engine.errors import UserError
from peftdyno.engine.pack import Pack
from peftdyno.engine.sized_tape import SizedTape
from peftdyno.engine.step_tapes import StepTapes
from peftdyno.engine.tape import unavailable
from peftdyno.engine.train import forward_backward

from .banks import FORMS, TinyModel, pack_of, random_sequences, relative, shake, small_method

pytestmark = pytest.mark.skipif(bool(unavailable()), reason="the C++ kernels, which replay tapes, are not built")
QUIET = Ledger(Scope(), on=False)
Lengths = list[list[int]]
"""Of the sequences of each run."""


def steps_of(model: TinyModel, form: str, choice: str = "on", runs: int = 1) -> StepTapes:
    bank = shake(model.bank(small_method(form), tuple(range(1, 1 + runs))))
    return StepTapes(model.decoder, bank, choice)  # type: ignore[arg-type]


def packed(tapes: StepTapes, lengths: Lengths) -> Pack:
    """Sequences of each run that share their prefix."""
    sequences = [s for run, own in enumerate(lengths) for s in random_sequences(own, run=run)]
    return pack_of(tapes.bank, sequences, share_prefix=True)


def gradient(model: TinyModel, tapes: StepTapes, packs: list[Lengths], step: int, record: bool = True):
    """Losses and gradient of a step, a micro-batch a pack."""
    packs_of_step = [packed(tapes, lengths) for lengths in packs]
    losses, _ = forward_backward(model.decoder, tapes.bank, packs_of_step, step, QUIET, tapes if record else None)
    return losses, tapes.bank.gradient.clone()


def lengths_of(step: int, runs: int) -> Lengths:
    """Another number of rows and of labels for each run in each step."""
    return [[9 + (5 * step + run) % 23, 14 + (3 * step + 2 * run) % 11] for run in range(runs)]


@pytest.mark.parametrize("runs", [1, 3])
@pytest.mark.parametrize("form", [form for form in FORMS if not small_method(form).unrecordable()])
def test_the_same_bits_replayed_or_not(form: str, runs: int, llama: TinyModel) -> None:
    """One that never records beside one that does, at sizes that never come again, and one that knows no recording."""
    replayed, launched = (steps_of(llama, form, runs=runs) for _ in range(2))
    launched.complaint = "never"
    for step in range(10):
        packs = [lengths_of(step, runs), lengths_of(step + 100, runs)]
        losses, ours = gradient(llama, replayed, packs, step)
        theirs, _ = launched.forward_backward([packed(launched, lengths) for lengths in packs], step, QUIET)
        assert losses == theirs and torch.equal(ours, launched.bank.gradient)
        expected = gradient(llama, launched, packs, step, record=False)
        assert losses == pytest.approx(expected[0], rel=1e-5) and relative(ours, expected[1]) < 1e-5
    ((tape,),) = replayed.tapes.values()
    assert tape.num_checked == step_tapes.NUM_CHECKED and replayed.num_recorded <= 5


def test_runs_that_take_no_part(llama: TinyModel) -> None:
    """Which runs have rows may make it another call: a tape of its own."""
    replayed = steps_of(llama, "lora", runs=3)
    for step in range(14):
        lengths = lengths_of(step, 3)
        lengths[step % 2 + 1] = []
        losses, ours = gradient(llama, replayed, [lengths], step)
        expected = gradient(llama, replayed, [lengths], step, record=False)
        assert losses == pytest.approx(expected[0], rel=1e-5) and relative(ours, expected[1]) < 1e-5
    assert [tape.num_checked for (tape,) in replayed.tapes.values()] == [step_tapes.NUM_CHECKED] * 2


def test_what_no_recording_fits_is_launched_once_there_are_many(
    llama: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_tapes, "MOST_RECORDED", 1)
    tapes = steps_of(llama, "ia3")
    for step, rows in enumerate((9, 40, 9, 70, 9)):
        found = gradient(llama, tapes, [[[rows]]], step)
        assert relative(found[1], gradient(llama, tapes, [[[rows]]], step, record=False)[1]) < 1e-5
    ((tape,),) = tapes.tapes.values()
    assert tapes.num_recorded == 1 and tape.num_checked == step_tapes.NUM_CHECKED


def test_steps_that_differ_in_more_than_their_sizes(llama: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recording is given up, and the training goes on."""
    monkeypatch.setattr(SizedTape, "learn", lambda *_: False)
    monkeypatch.setattr(step_tapes, "MOST_TAPES", 2)
    tapes = steps_of(llama, "ia3", "auto")
    for step in range(2):
        gradient(llama, tapes, [lengths_of(step, 1)], step)
    with pytest.warns(UserWarning, match="goes on without recorded steps: .* differ in more than their sizes"):
        found = gradient(llama, tapes, [lengths_of(2, 1)], 2)
    expected = gradient(llama, tapes, [lengths_of(2, 1)], 2, record=False)
    assert found[0] == pytest.approx(expected[0], rel=1e-5) and relative(found[1], expected[1]) < 1e-5


@pytest.mark.parametrize("choice", ["on", "auto"])
def test_a_replay_that_differs_is_reported(choice: str, llama: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay that reads the pack before: by `auto` the step's results are those without the recording."""
    at, given = SizedTape.at, []

    def late(tape: SizedTape, sizes, tensors):
        given.append(tensors)
        return at(tape, sizes, given[max(0, len(given) - 2)])

    monkeypatch.setattr(SizedTape, "at", late)
    tapes = steps_of(llama, "lora", choice)
    gradient(llama, tapes, [[[9, 14]]], 0)
    if choice == "on":
        with pytest.raises(UserError, match=r"--graphs on: .*differs from the eager step"):
            gradient(llama, tapes, [[[14, 9]]], 5)
        return
    with pytest.warns(UserWarning, match="goes on without recorded steps"):
        found = gradient(llama, tapes, [[[14, 9]]], 5)
    expected = gradient(llama, tapes, [[[14, 9]]], 5, record=False)
    assert found[0] == pytest.approx(expected[0], rel=1e-5) and relative(found[1], expected[1]) < 1e-5


def test_a_counted_step_gives_the_same_bits(llama: TinyModel) -> None:
    tapes = steps_of(llama, "lora")
    ledger = Ledger.of(llama.decoder, tapes.bank)
    pack, found = packed(tapes, [[9, 14]]), []
    for _ in range(step_tapes.NUM_CHECKED + 2):
        found.append(forward_backward(llama.decoder, tapes.bank, [pack], 7, ledger, tapes))
        found[-1] += (tapes.bank.gradient.clone(),)
        ledger.end_step()
    assert ledger.sampled == [0] and ledger.tokens == [pack.num_tokens] * len(found)
    assert all(losses == found[0][0] and tokens == pack.num_tokens for losses, tokens, _ in found)
    assert all(torch.equal(own, found[0][2]) for *_, own in found)


def test_both_passes_are_charged(llama: TinyModel) -> None:
    """With a recording and without: seconds stand under forward and backward as they do in any step."""
    tapes = steps_of(llama, "lora")
    ledger = Ledger.of(llama.decoder, tapes.bank)
    pack = packed(tapes, [[9, 14]])
    for step in range(step_tapes.NUM_CHECKED + 2):
        forward_backward(llama.decoder, tapes.bank, [pack], step, ledger, tapes)
        ledger.end_step()
    launched, *_, replayed = ledger.clock.read()
    assert set(launched) == set(replayed) == {"forward", "backward"}
    ((tape,),) = tapes.tapes.values()
    assert 0 < tape.repeated.num_forward < tape.repeated.num_calls
