"""Steps replayed from tapes: the same bits with a recording and without, checked by what costs no second gradient."""

from collections.abc import Callable

import pytest
import torch

from peftdyno.engine import step_tapes
from peftdyno.engine.accounting.ledger import Ledger
from peftdyno.engine.accounting.scope import Scope
from peftdyno.engine.errors import UserError
from peftdyno.engine.graphs import EagerRecorder, Recorder
from peftdyno.engine.pack_padding import PackSize
from peftdyno.engine.step_tapes import SEEN_BEFORE, StepTapes
from peftdyno.engine.tape import TapeRecorder, unavailable
from peftdyno.engine.train import forward_backward

from .banks import FORMS, TinyModel, pack_of, random_sequences, relative, shake, small_method

pytestmark = pytest.mark.skipif(bool(unavailable()), reason="the C++ kernels, which replay tapes, are not built")
QUIET = Ledger(Scope(), on=False)


def steps_of(model: TinyModel, form: str, recorder: Recorder, choice: str = "on") -> StepTapes:
    return StepTapes(model.decoder, shake(model.bank(small_method(form), (1,))), recorder, choice)  # type: ignore[arg-type]


def gradient(model: TinyModel, tapes: StepTapes, lengths: list[list[int]], step: int, record: bool = True):
    """Losses and gradient of a step, a micro-batch a list; those of several sequences share their prefix."""
    packs = [pack_of(tapes.bank, random_sequences(part), share_prefix=True) for part in lengths]
    losses, _ = forward_backward(model.decoder, tapes.bank, packs, step, QUIET, tapes if record else None)
    return losses, tapes.bank.gradient.clone()


@pytest.mark.parametrize("form", [form for form in FORMS if not small_method(form).unrecordable()])
def test_the_same_bits_replayed_or_not(form: str, llama: TinyModel) -> None:
    """One that never records beside one that does, over several sizes and micro-batches; and what is not padded, as in
    a bank of several runs."""
    replayed = steps_of(llama, form, TapeRecorder())
    launched = steps_of(llama, form, TapeRecorder())
    launched.complaint = "never"
    for step in range(8):
        for lengths in ([[9, 14]], [[40, 23], [8, 7]]):
            losses, ours = gradient(llama, replayed, lengths, step)
            packs = [pack_of(launched.bank, random_sequences(part), share_prefix=True) for part in lengths]
            theirs, _ = launched.forward_backward(packs, step, QUIET)
            assert losses == theirs and torch.equal(ours, launched.bank.gradient)
            expected = gradient(llama, launched, lengths, step, record=False)
            assert losses == pytest.approx(expected[0], rel=1e-5) and relative(ours, expected[1]) < 1e-5
    assert all(r.num_checked == step_tapes.NUM_CHECKED for r in replayed.recordings.values())
    assert len(replayed.recordings) == 2, "the second micro-batch of a step makes none"


def test_a_size_is_recorded_when_it_comes_again(llama: TinyModel) -> None:
    tapes = steps_of(llama, "lora", TapeRecorder())
    for step in range(SEEN_BEFORE):
        gradient(llama, tapes, [[9, 14]], step)
        assert not tapes.recordings
    gradient(llama, tapes, [[10, 12]], 9)
    assert [size.rows for size in tapes.recordings] == [32]


def test_the_tape_not_used_for_longest_goes(llama: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_tapes, "MOST_TAPES", 2)
    tapes = steps_of(llama, "ia3", TapeRecorder())
    for rows in (9, 40, 9, 70):
        for step in range(SEEN_BEFORE + 1):
            gradient(llama, tapes, [[rows]], step)
    assert [size.rows for size in tapes.recordings] == [16, 80]


class Swapped(EagerRecorder):
    """A replay whose gradient is that of other parameters: its halves are exchanged."""

    def __init__(self, bank) -> None:
        self.bank = bank

    def record(self, call: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        def again() -> torch.Tensor:
            out = call()
            half = self.bank.gradient.shape[1] // 2
            self.bank.gradient.copy_(self.bank.gradient.roll(half, dims=1))
            return out

        return again


@pytest.mark.parametrize("choice", ["on", "auto"])
def test_a_replay_that_differs_is_reported(choice: str, llama: TinyModel) -> None:
    """The sketch of a gradient sees it; by `auto` the step's results are those without the recording."""
    tapes = steps_of(llama, "lora", EagerRecorder(), choice)
    tapes.recorder = Swapped(tapes.bank)
    for step in range(SEEN_BEFORE):
        gradient(llama, tapes, [[9, 14]], step)
    if choice == "on":
        with pytest.raises(UserError, match=r"--graphs on: .*differs from the eager step"):
            gradient(llama, tapes, [[9, 14]], 5)
        return
    with pytest.warns(UserWarning, match="goes on without recorded steps"):
        found = gradient(llama, tapes, [[9, 14]], 5)
    expected = gradient(llama, tapes, [[9, 14]], 5, record=False)
    assert found[0] == pytest.approx(expected[0], rel=1e-5) and relative(found[1], expected[1]) < 1e-5


def test_what_is_seen_and_counted_is_padded(llama: TinyModel) -> None:
    """As it is computed; the tokens of the step are the pack's own. A counted step gives the same bits."""
    tapes = steps_of(llama, "lora", TapeRecorder())
    ledger = Ledger.of(llama.decoder, tapes.bank)
    pack = pack_of(tapes.bank, random_sequences([9, 14]))
    size = PackSize.of(pack, fine=True)
    found = []
    for _ in range(SEEN_BEFORE + 3):
        found.append(forward_backward(llama.decoder, tapes.bank, [pack], 7, ledger, tapes))
        found[-1] += (tapes.bank.gradient.clone(),)
        ledger.end_step()
    assert ledger.sampled == [0] and ledger.tokens == [size.rows] * len(found) == [32] * len(found)
    assert all(losses == found[0][0] and tokens == 23 for losses, tokens, _ in found)
    assert all(torch.equal(own, found[0][2]) for *_, own in found)
    assert ledger.recording_bytes == sum(r.nbytes() for r in tapes.recordings.values()) > 0


def test_auto_takes_small_packs(llama: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tapes = steps_of(llama, "ia3", TapeRecorder(), "auto")
    small, large = (pack_of(tapes.bank, random_sequences(lengths)) for lengths in ([9], [90]))
    monkeypatch.setattr(step_tapes, "MOST_TOKENS", 64)
    assert tapes.takes([small]) and not tapes.takes([small, large])
    tapes.choice = "on"
    assert tapes.takes([small, large])


def test_both_passes_are_charged(llama: TinyModel) -> None:
    """With a recording and without: seconds stand under forward and backward as they do in any step."""
    tapes = steps_of(llama, "lora", TapeRecorder())
    ledger = Ledger.of(llama.decoder, tapes.bank)
    pack = pack_of(tapes.bank, random_sequences([9, 14]))
    for step in range(SEEN_BEFORE + step_tapes.NUM_CHECKED + 2):
        forward_backward(llama.decoder, tapes.bank, [pack], step, ledger, tapes)
        ledger.end_step()
    launched, *_, replayed = ledger.clock.read()
    assert set(launched) == set(replayed) == {"forward", "backward"}
    (recording,) = tapes.recordings.values()
    assert 0 < recording.again.num_forward < recording.again.num_calls
