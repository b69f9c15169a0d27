"""TASKS: every data set of the bench by name."""

from __future__ import annotations

from peftdyno.bench.task import Task
from peftdyno.bench.tasks import generated, glue, maths_code, reasoning, superglue, topics
from peftdyno.engine.errors import unknown

PEFT_BENCH: tuple[Task, ...] = (*glue.TASKS, *superglue.TASKS, *reasoning.TASKS, *maths_code.TASKS)
TASKS: dict[str, Task] = {task.name: task for task in (*PEFT_BENCH, *topics.TASKS, *generated.TASKS)}
assert len(TASKS) == len(PEFT_BENCH) + len(topics.TASKS) + len(generated.TASKS), "two tasks share a name"


def get_task(name: str, tasks: dict[str, Task] | None = None) -> Task:
    """The task of that name; UserError with the closest names otherwise."""
    known = TASKS if tasks is None else tasks
    if name not in known:
        raise unknown("task", name, known)
    return known[name]
