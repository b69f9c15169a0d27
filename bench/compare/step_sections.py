"""Sections that time one training step over a fixed batch: two sizes, memory, torch.compile, every method."""

from __future__ import annotations

from typing import Any

from peftdyno.bench.compare.equal_work import UnequalWork
from peftdyno.bench.compare.link import Worker, WorkerError
from peftdyno.bench.compare.rows import text_batch, text_batches
from peftdyno.bench.compare.sides import CHECK_STEPS, Sides
from peftdyno.bench.compare.turns import Row, in_turns, rates
from peftdyno.engine.adapters import METHODS

LORA: dict[str, Any] = {"rank": 16, "alpha": 16.0, "target_modules": ["k_proj", "v_proj", "down_proj"]}
"""PEFT-Bench's LoRA, whose dropout is 0.05."""
DROPOUT = 0.05
PLAIN = "transformers + PEFT, plain loop"
RATE = 5e-5
PACKED = ", --pack-weights on"
"""Weights kept in the forms that products read."""
FEW_STEPS = 2
"""Compared steps where a step takes long or there are many comparisons; the second follows the first update."""
WITHOUT_DROPOUT: dict[str, dict[str, Any]] = {"lora": {"dropout": 0.0}, "p-tuning": {"dropout": 0.0}}
METHOD_ROUNDS = 2
"""Rounds of a method's row at most: none of them has a goal, and there are ten."""
MEMORY_ROUNDS = 2
"""Rounds of the memory's row at most: peaks differ by less than a hundredth."""
IN_PEFT = ("lora", "ia3", "ln-tuning", "prompt-tuning", "p-tuning", "prefix-tuning")
"""Methods that PEFT trains too. It has a form for what BitFit stores, but would train more than the biases."""


def open_steps(sides: Sides, name: str, method: str, options: dict[str, Any], batch: list[Any]) -> None:
    """Open the same steps on both sides, from the same adapter; ours as they are in a long training."""
    settings = {"model": sides.model, "batches": [batch], "learning_rate": RATE}
    sides.ours.open("ours.steps", **settings, method=method, options=options)
    sides.ours.call("save", folder=sides.folder(name))
    sides.ours.call("settle")
    sides.reference.open("plain.steps", **settings, adapter=sides.folder(name))


def step_rows(sides: Sides, length: int, goal: float, default_steps: int, check_steps: int) -> list[Row]:
    """LoRA's step over 4 rows of real tokens, all labelled, against the plain loop: as it is, and with panels."""
    name = f"LoRA step, 4 x {length} tokens, all labelled, dropout {DROPOUT}"
    batch = text_batch(4, length, sides.classification.train)
    check = sides.check_plain("lora", {**LORA, "dropout": 0.0}, [batch], f"step-{length}", check_steps)
    open_steps(sides, f"step-{length}", "lora", {**LORA, "dropout": DROPOUT}, batch)
    steps = sides.plan.steps_or(default_steps)
    sides.tell(f"  {name}: {sides.plan.repeats} rounds of {steps} steps")
    samples = in_turns(
        {
            "": lambda _: sides.ours.call("measure", steps=steps),
            "reference": lambda _: sides.reference.call("measure", steps=steps),
            PACKED: lambda _: sides.ours.call("measure_packed", steps=steps),
        },
        sides.plan.repeats,
    )
    return [
        Row(
            workload=name + form,
            against=PLAIN,
            unit="steps/s",
            ours=tuple(rates(samples[form])),
            reference=tuple(rates(samples["reference"])),
            goal=goal,
            check=check,
        )
        for form in ("", PACKED)
    ]


def short_steps(sides: Sides) -> list[Row]:
    """4 x 128."""
    return step_rows(sides, 128, 4.0, 2, CHECK_STEPS)


def long_steps(sides: Sides) -> list[Row]:
    """4 x 512."""
    return step_rows(sides, 512, 5.0, 1, FEW_STEPS)


def memory(sides: Sides) -> list[Row]:
    """Peak memory of the 4 x 512 step, in processes that have done nothing else."""
    with sides.fresh():
        batch = text_batch(4, 512, sides.classification.train)
        open_steps(sides, "memory", "lora", {**LORA, "dropout": DROPOUT}, batch)
        sides.tell("  memory of a step, 4 x 512 tokens")
        sample = {
            "ours": lambda _: sides.ours.call("measure_memory"),
            "reference": lambda _: sides.reference.call("measure_memory"),
        }
        samples = in_turns(sample, min(sides.plan.repeats, MEMORY_ROUNDS))
        traced = {"ours": sides.ours.call("allocated_peak"), "reference": sides.reference.call("allocated_peak")}
    peaks = {name: tuple(s["peak_bytes"] / 1e6 for s in found) for name, found in samples.items()}
    resident = Row(
        workload="peak resident set of the whole process, step of 4 x 512",
        against=PLAIN,
        unit="MB",
        **peaks,
        goal=0.5,
        better="lower",
        note="the process holds its libraries too",
    )
    return [resident, *_allocated_rows(traced)]


def _allocated_rows(traced: dict[str, dict[str, int] | None]) -> list[Row]:
    """Weights, optimizer state and the most that a step allocated above them; and with our panels of the weights."""
    names = {
        "workload": "peak of PyTorch's allocator, step of 4 x 512",
        "against": PLAIN,
        "unit": "MB",
        "goal": 0.5,
        "better": "lower",
    }
    found = {name: figures for name, figures in traced.items() if figures is not None}
    if len(found) < len(traced):
        return [Row(**names, ours=(), note="not measured: the C++ extension, which records it, is not built")]
    parts = ", ".join(f"{name} {f['held'] / 1e6:.0f} + {f['step'] / 1e6:.0f}" for name, f in found.items())
    totals = {name: (f["held"] + f["step"]) / 1e6 for name, f in found.items()}
    panels = found["ours"]["panels"] / 1e6
    plain = Row(
        **names,
        **{name: (total,) for name, total in totals.items()},
        note=f"MB held before + most allocated in the step: {parts}; one measurement",
    )
    names["workload"] += PACKED
    note = f"the row before and {panels:.0f} MB of panels"
    packed = Row(**names, ours=(totals["ours"] + panels,), reference=(totals["reference"],), note=note)
    return [plain, packed]


def compiled(sides: Sides) -> list[Row]:
    """The 4 x 128 step against the plain loop with torch.compile, as long as that compiles in the time allowed."""
    name = "LoRA step, 4 x 128 tokens, all labelled"
    names = {"workload": f"{name}, dropout {DROPOUT}", "against": f"{PLAIN}, torch.compile", "unit": "steps/s"}
    batch = text_batch(4, 128, sides.classification.train)
    settings = {"model": sides.model, "batches": [batch], "learning_rate": RATE, "adapter": sides.folder("compiled")}
    worker = Worker("reference, compiled", sides.environment)
    allowed = sides.plan.compile_seconds
    sides.tell(f"  torch.compile of the plain loop, at most {allowed:.0f} s each time")
    try:
        check = sides.check_plain("lora", {**LORA, "dropout": 0.0}, [batch], "compiled", FEW_STEPS, worker)
        open_steps(sides, "compiled", "lora", {**LORA, "dropout": DROPOUT}, batch)
        worker.open("plain.steps", allowed, **settings, compiled=True)
        warm_up = worker.call("measure", allowed, steps=1)["seconds"]
        steps = sides.plan.steps_or(2)
        measures = {
            "ours": lambda _: sides.ours.call("measure", steps=steps),
            "reference": lambda _: worker.call("measure", allowed, steps=steps),
        }
        samples = in_turns(measures, sides.plan.repeats)
    except WorkerError as error:
        return [Row(**names, ours=(), note=f"does not work here: {error}")]
    finally:
        worker.close()
    values = {name: tuple(rates(found)) for name, found in samples.items()}
    return [Row(**names, **values, check=check, note=f"its first step, with compilation, took {warm_up:.0f} s")]


def methods(sides: Sides) -> list[Row]:
    """A step of 4 x 128 of every method of the registry, against PEFT's where PEFT trains it."""
    batch = text_batch(4, 128, sides.classification.train)
    return [_method_row(sides, name, batch) for name in METHODS]


def _method_row(sides: Sides, name: str, batch: list[Any]) -> Row:
    names = {"workload": f"step of {name}, 4 x 128 tokens, all labelled", "unit": "steps/s"}
    steps, rounds = sides.plan.steps_or(1), min(sides.plan.repeats, METHOD_ROUNDS)
    if name not in IN_PEFT:
        settings = {"model": sides.model, "batches": [batch], "learning_rate": RATE}
        sides.ours.open("ours.steps", **settings, method=name, options={})
        sides.tell(f"  {name}: ours alone")
        samples = in_turns({"ours": lambda _: sides.ours.call("measure", steps=steps)}, rounds)
        return Row(**names, against="none: PEFT does not train it", ours=tuple(rates(samples["ours"])))
    compared = text_batches(FEW_STEPS, 4, 128, sides.classification.train)
    try:
        check = sides.check_plain(name, WITHOUT_DROPOUT.get(name, {}), compared, name, FEW_STEPS)
    except UnequalWork as error:
        return Row(**names, against=PLAIN, ours=(), note=f"FAILED, unequal work: {error}", failed=True)
    open_steps(sides, f"method-{name}", name, {}, batch)
    sides.tell(f"  {name}: {rounds} rounds of {steps} steps")
    measures = {
        "ours": lambda _: sides.ours.call("measure", steps=steps),
        "reference": lambda _: sides.reference.call("measure", steps=steps),
    }
    values = {side: tuple(rates(found)) for side, found in in_turns(measures, rounds).items()}
    return Row(**names, against=PLAIN, **values, check=check)
