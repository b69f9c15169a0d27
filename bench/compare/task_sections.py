"""Sections that time what a user runs on a task: training, several seeds, evaluation, long generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from peftdyno.bench.compare.equal_work import LabelNoise, Trajectory, check_steps, check_tokens
from peftdyno.bench.compare.link import Worker
from peftdyno.bench.compare.rows import in_order
from peftdyno.bench.compare.sides import CHECK_STEPS, Sides
from peftdyno.bench.compare.step_sections import DROPOUT, LORA, PACKED, RATE
from peftdyno.bench.compare.turns import Row, in_turns, rates

BATCH = 4
"""PEFT-Bench's, in training and in evaluation."""
EVALUATION_BATCH = 32
"""Ours where --evaluation-batch is not given: eight times the training batch."""
SEEDS = (42, 123, 456, 789, 101112)
"""PEFT-Bench's."""
TRAINER = "HF Trainer + PEFT as PEFT-Bench"
GENERATE = "transformers generate, KV cache"
OUR_STEPS = 4
"""Our turn takes this many times the reference's steps, so that it is not too short for the clock."""
RUN_STEPS = 1000
"""Steps of a run where runs an hour are stated."""
LONG_BATCH, LONG_TOKENS, CHECK_TOKENS = 16, 256, 32
SETTLED_STEPS = 12
"""Steps of our training before it is timed: recordings have been made and checked by then."""
LONG_TRAININGS = {"repeated": (DROPOUT, "auto"), "shared": (DROPOUT, "on"), "exact": (0.0, "auto")}
"""Name -> dropout and --share-prefix of our trainings of one seed."""
TUNING_STEPS, TUNING_BATCH, TUNING_RATE = 40, 8, 1e-3
"""Training of the adapter whose answers are timed, so that it answers with a label as a tuned model does."""


def optim(rate: float) -> dict[str, Any]:
    """PEFT-Bench's optimizer settings."""
    return {"learning_rate": rate, "weight_decay": 1e-5, "warmup_ratio": 0.1, "max_grad_norm": 1.0}


def open_ours(
    sides: Sides, seeds: Sequence[int], dropout: float, share: str, steps: int, rate: float = RATE, batch: int = BATCH
) -> None:
    """Our training of LoRA runs on the classification task."""
    options = {**LORA, "dropout": dropout}
    sides.ours.open("ours.training", **training_of(sides, "lora", options, seeds, share, steps, rate, batch))


def training_of(
    sides: Sides,
    method: str,
    options: dict[str, Any],
    seeds: Sequence[int],
    share: str,
    steps: int,
    rate: float = RATE,
    batch: int = BATCH,
) -> dict[str, Any]:
    """Settings of our training of a method's runs on the classification task."""
    return {
        "model": sides.model,
        "method": method,
        "options": options,
        "rows": sides.classification.train,
        "seeds": list(seeds),
        "batch": batch,
        "steps": steps,
        "optim": optim(rate),
        "share_prefix": share,
    }


def start_folders(sides: Sides, seeds: Sequence[int], dropout: float) -> list[str]:
    """The runs' starting adapters, written by our side."""
    folders = [sides.folder(f"train-{seed}-{dropout}") for seed in seeds]
    open_ours(sides, seeds, dropout, "auto", 1)
    sides.ours.call("save", folders=folders)
    return folders


def open_trainer(sides: Sides, seeds: Sequence[int], folders: list[str], steps: int, dtype: str = "bf16") -> None:
    """The same runs by HF Trainer, from our adapters and in our order."""
    orders = [in_order(sides.classification.train, BATCH, seed, steps) for seed in seeds]
    sides.reference.open(
        "trainer.training",
        model=sides.model,
        adapters=folders,
        rows=[[row for batch in order for row in batch] for order in orders],
        batch=BATCH,
        steps=steps,
        optim=optim(RATE),
        dtype=dtype,
    )


def check_training(sides: Sides, seeds: Sequence[int], shares: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Compare a few steps of the first seed's run without dropout with HF Trainer's, for each way to share prefixes."""
    sides.tell(f"  {len(seeds)} runs: comparing {CHECK_STEPS} steps")
    folders = start_folders(sides, seeds, 0.0)
    found = {}
    for dtype in ("bf16", "fp32"):
        open_trainer(sides, seeds[:1], folders[:1], CHECK_STEPS, dtype)
        found[dtype] = Trajectory(**sides.reference.call("trajectory"))
    noise = _label_noise(sides, seeds[0], folders[0])
    checks = {}
    for share in shares:
        open_ours(sides, seeds, 0.0, share, CHECK_STEPS)
        ours = Trajectory(**sides.ours.call("trajectory"))
        checks[share] = check_steps(ours, found["bf16"], found["fp32"], noise)
    return checks


def _label_noise(sides: Sides, seed: int, folder: str) -> LabelNoise:
    """Label by label, what bf16 does to the losses of the first batch.

    The two labels of a row err alike: a batch's mean errs as if it had as many independent labels as rows, which
    `choices noise` measures.
    """
    batch = in_order(sides.classification.train, BATCH, seed, 1)
    settings = {"model": sides.model, "batches": batch, "learning_rate": RATE, "adapter": folder}
    losses = []
    for dtype in ("bf16", "fp32"):
        sides.reference.open("plain.steps", **settings, dtype=dtype)
        losses.append(sides.reference.call("label_losses"))
    return LabelNoise(*losses, independent=BATCH)


def training(sides: Sides) -> list[Row]:
    """One seed, batch 4, response labels: ours as a user may set prefix sharing, with and without dropout."""
    checks = check_training(sides, SEEDS[:1], ("off", "on"))
    steps = 1 + sides.plan.steps_or(2)
    seed = SEEDS[:1]
    folders = {dropout: start_folders(sides, seed, dropout) for dropout in (DROPOUT, 0.0)}

    def trainer(dropout: float) -> dict[str, float]:
        open_trainer(sides, seed, folders[dropout], steps)
        return sides.reference.call("measure", run=0)

    turn = 1 + OUR_STEPS * (steps - 1)
    with ExitStack() as stack:
        ours = {
            name: _long_training(sides, stack, "lora", {**LORA, "dropout": dropout}, seed, share)
            for name, (dropout, share) in LONG_TRAININGS.items()
        }
        sides.tell(f"  training on {sides.classification.name}: {sides.plan.repeats} rounds of 5 settings")
        samples = in_turns(
            {
                "repeated": lambda _: ours["repeated"].call("advance", steps=turn),
                "dropout": lambda _: trainer(DROPOUT),
                "shared": lambda _: ours["shared"].call("advance", steps=turn),
                "repeated, packed": lambda _: ours["repeated"].call("advance", steps=turn, pack_weights="on"),
                "shared, packed": lambda _: ours["shared"].call("advance", steps=turn, pack_weights="on"),
                "exact": lambda _: ours["exact"].call("advance", steps=turn),
                "no dropout": lambda _: trainer(0.0),
            },
            sides.plan.repeats,
            warm_ups=0,  # each turn's first step is not counted
        )
    repeated = f"dropout {DROPOUT}, --share-prefix auto, which with dropout is off"
    shared = f"dropout {DROPOUT}, --share-prefix on"
    late = f"ours from step {SETTLED_STEPS} of a training on"
    return [
        Row(
            workload=f"{sides.classification.name} training, batch {BATCH}, {setting}",
            against=TRAINER,
            unit="examples/s",
            ours=tuple(rates(samples[which])),
            reference=tuple(rates(samples[reference])),
            goal=10.0,
            check=checks[share],
            note="; ".join(filter(None, (late, sides.classification.note))),
        )
        for which, reference, setting, share in (
            ("repeated", "dropout", repeated, "off"),
            ("repeated, packed", "dropout", repeated + PACKED, "off"),
            ("shared", "dropout", shared, "on"),
            ("shared, packed", "dropout", shared + PACKED, "on"),
            ("exact", "no dropout", "dropout 0 on both sides, --share-prefix auto, which is then on", "on"),
        )
    ]


def _long_training(
    sides: Sides, stack: ExitStack, method: str, options: dict[str, Any], seeds: Sequence[int], share: str
) -> Worker:
    """Our training, at work until it is settled, in a process of its own."""
    worker = stack.enter_context(sides.another("ours, long training"))
    worker.open("ours.long_training", **training_of(sides, method, options, seeds, share, RUN_STEPS))
    worker.call("advance", steps=SETTLED_STEPS if sides.plan.steps is None else 2)
    return worker


def seeds(sides: Sides) -> list[Row]:
    """Five seeds in one bank against five runs of HF Trainer, one after another: each round times the next of them."""
    checks = check_training(sides, SEEDS, ("off", "on"))
    steps = 1 + sides.plan.steps_or(2)
    folders = start_folders(sides, SEEDS, DROPOUT)

    def trainer(turn: int) -> dict[str, float]:
        open_trainer(sides, SEEDS, folders, steps)
        return sides.reference.call("measure", run=turn % len(SEEDS))

    options = {**LORA, "dropout": DROPOUT}
    with ExitStack() as stack:
        ours = {share: _long_training(sides, stack, "lora", options, SEEDS, share) for share in ("auto", "on")}
        sides.tell(f"  {len(SEEDS)} seeds together: {sides.plan.repeats} rounds")
        turns = {
            "auto": lambda _: ours["auto"].call("advance", steps=steps),
            "reference": trainer,
            "on": lambda _: ours["on"].call("advance", steps=steps, pack_weights="on"),
        }
        samples = in_turns(turns, sides.plan.repeats, warm_ups=0)
    per = 3600 / (RUN_STEPS * BATCH)
    return [
        Row(
            workload=f"{len(SEEDS)} seeds of it together, dropout {DROPOUT}, --share-prefix {setting}",
            against=f"{TRAINER}, one after another",
            unit=f"runs/hour of {RUN_STEPS} steps",
            ours=tuple(rates(samples[share], per)),
            reference=tuple(rates(samples["reference"], per)),
            goal=20.0,
            check=checks[checked],
            note=sides.classification.note,
        )
        for share, checked, setting in (("auto", "off", "auto"), ("on", "on", "on --pack-weights on"))
    ]


def together(sides: Sides) -> list[Row]:
    """Five seeds of a method in one bank against one of them alone."""
    counted = sides.plan.steps_or(2)
    steps, alone = 1 + counted, 1 + OUR_STEPS * counted
    settings = {
        f"lora, dropout {DROPOUT}, --share-prefix auto": ("lora", {**LORA, "dropout": DROPOUT}, "auto"),
        f"lora, dropout {DROPOUT}, --share-prefix on": ("lora", {**LORA, "dropout": DROPOUT}, "on"),
        "ia3, --share-prefix auto, which is on": ("ia3", {}, "auto"),
    }

    measures: dict[str, Callable[[int], dict[str, float]]] = {}
    with ExitStack() as stack:
        for which, (method, options, share) in settings.items():
            for name, members, turn in ((which, SEEDS, steps), (f"alone {which}", SEEDS[:1], alone)):
                worker = _long_training(sides, stack, method, options, members, share)
                measures[name] = lambda _, worker=worker, turn=turn: worker.call("advance", steps=turn)
        sides.tell(f"  {len(SEEDS)} seeds together and alone: {sides.plan.repeats} rounds of {len(settings)} settings")
        samples = in_turns(measures, sides.plan.repeats, warm_ups=0)
    per = 3600 / (RUN_STEPS * BATCH)
    return [
        Row(
            workload=f"{len(SEEDS)} seeds together on {sides.classification.name}, batch {BATCH}, {which}",
            against="the same runs of ours, one after another",
            unit=f"runs/hour of {RUN_STEPS} steps",
            ours=tuple(rates(samples[which], per)),
            reference=tuple(rates(samples[f"alone {which}"], per)),
            goal=2.0,
            note=sides.classification.note,
        )
        for which in settings
    ]


def open_generation(sides: Sides, adapter: str, dtype: str, batches: tuple[int, int], **settings: Any) -> None:
    """Generation with the same adapter; `batches` are ours and the reference's, `pack_weights` is ours."""
    settings |= {"model": sides.model, "adapter": adapter}
    packed = settings.pop("pack_weights")
    sides.ours.open("ours.generation", **settings, batch=batches[0], pack_weights=packed)
    sides.reference.open("transformers.generation", **settings, batch=batches[1], dtype=dtype)


def check_generation(
    sides: Sides, adapter: str, batches: tuple[int, int], tokens: int, **settings: Any
) -> dict[str, Any]:
    """Compare greedy tokens."""
    sides.tell(f"  generation: comparing up to {tokens} tokens of {len(settings['prompts'])} prompts")
    found = {}
    for dtype in ("fp32", "bf16"):
        open_generation(sides, adapter, dtype, batches, **settings)
        found[dtype] = sides.reference.call("tokens", max_new_tokens=tokens)
    return check_tokens(sides.ours.call("tokens", max_new_tokens=tokens), found["bf16"], found["fp32"])


def generation_row(
    sides: Sides, name: str, adapter: str, batches: tuple[int, int], goal: float, note: str, **settings: Any
) -> Row:
    """Time greedy generation over all prompts."""
    tokens = min(settings["max_new_tokens"], CHECK_TOKENS)
    check = check_generation(sides, adapter, batches, tokens, **settings)
    sides.tell(f"  {name}: {sides.plan.repeats} rounds")
    measures = {
        "ours": lambda _: sides.ours.call("measure"),
        "reference": lambda _: sides.reference.call("measure"),
    }
    samples = in_turns(measures, sides.plan.repeats, warm_ups=0)  # the comparison of tokens was one
    return Row(
        workload=name,
        against=f"{GENERATE}, batch {batches[1]}",
        unit=f"{settings['unit']}/s",
        ours=tuple(rates(samples["ours"])),
        reference=tuple(rates(samples["reference"])),
        goal=goal,
        check=check,
        note=note,
    )


def evaluation(sides: Sides) -> list[Row]:
    """Scoring a tuned adapter on the classification task by greedy generation."""
    task = sides.classification
    adapter = sides.folder("tuned")
    steps = min(TUNING_STEPS, sides.plan.steps_or(TUNING_STEPS))
    sides.tell(f"  tuning an adapter for {steps} steps, to be evaluated")
    open_ours(sides, SEEDS[:1], 0.0, "on", steps, TUNING_RATE, TUNING_BATCH)
    sides.ours.call("finish")
    sides.ours.call("save", folders=[adapter])
    name = f"{task.name} evaluation by greedy generation, ours in batches of {EVALUATION_BATCH}"
    return [
        generation_row(
            sides, name, adapter, (EVALUATION_BATCH, BATCH), 10.0, task.note,
            prompts=task.prompts, max_new_tokens=task.max_new_tokens, eos_ids=list(task.eos_ids), unit="examples",
            pack_weights="off",
        )
    ]  # fmt: skip


def generation(sides: Sides) -> list[Row]:
    """Long answers, every one of the full length on both sides."""
    task = sides.reasoning
    (adapter,) = start_folders(sides, SEEDS[:1], DROPOUT)
    tokens = min(LONG_TOKENS, sides.plan.steps_or(LONG_TOKENS))
    name = f"{task.name} generation, {tokens} new tokens, batch {LONG_BATCH}"
    return [
        generation_row(
            sides, name, adapter, (LONG_BATCH, LONG_BATCH), 2.0, task.note,
            prompts=task.prompts[:LONG_BATCH], max_new_tokens=tokens, eos_ids=[], unit="tokens",
            pack_weights="auto",
        )
    ]  # fmt: skip
