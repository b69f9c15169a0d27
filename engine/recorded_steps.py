"""Which training steps are recorded and replayed: by choice, device, method and number of steps."""

from __future__ import annotations

from typing import get_args

from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.decoder import Decoder
from peftdyno.engine.errors import UserError, unknown
from peftdyno.engine.graphs import CudaRecorder, GraphChoice, Recorder, unrecordable
from peftdyno.engine.replayed_steps import ReplayedSteps
from peftdyno.engine.step_graphs import StepGraphs
from peftdyno.engine.step_tapes import StepTapes

LEAST_STEPS, LEAST_TAPED = 32, 128
"""Steps below which `auto` does not record, on a GPU and on a CPU: recordings and their checks cost some."""


def step_graphs(
    choice: GraphChoice | Recorder, decoder: Decoder, bank: AdapterBank, num_steps: int
) -> ReplayedSteps | None:
    """What a training of so many steps replays, or None to launch every kernel.

    `auto` records with Triton's or the C++ kernels, where the method, the activation policy and the number of steps
    allow it. UserError for an unknown choice, and for `on` where a step cannot be recorded.
    """
    if isinstance(choice, str) and choice not in get_args(GraphChoice):
        raise unknown("--graphs", choice, get_args(GraphChoice))
    if choice == "off":
        return None
    why = _unrecordable(decoder, bank, of_device=isinstance(choice, str))
    if why:
        if choice == "auto":
            return None
        raise UserError(f"--graphs on: {why}")
    if not isinstance(choice, str):
        return StepGraphs(decoder, bank, recorder=choice)
    on_cpu = decoder.device.type == "cpu"
    if choice == "auto" and num_steps < (LEAST_TAPED if on_cpu else LEAST_STEPS):
        return None
    if on_cpu:
        return StepTapes(decoder, bank, choice)
    return StepGraphs(decoder, bank, choice, recorder=CudaRecorder())


def _unrecordable(decoder: Decoder, bank: AdapterBank, *, of_device: bool) -> str:
    """Why a step cannot be recorded, and the remedy; empty where it can."""
    reason = _unrecordable_here(decoder, bank) if of_device else ""
    if reason:
        return reason
    if decoder.activations != "keep":
        return f"--activations {decoder.activations} cannot be recorded; give --activations keep, or --graphs off"
    reason = next(filter(None, (method.unrecordable() for method in bank.methods)), "")
    return f"{reason}; give --graphs auto or off" if reason else ""


def _unrecordable_here(decoder: Decoder, bank: AdapterBank) -> str:
    """Why the device's own recorder cannot, and the remedy; empty where it can."""
    return unrecordable(decoder.device)
