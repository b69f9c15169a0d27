"""The table of all tasks for docs/tasks.md: `python -m peftdyno.bench.tasks.table`."""

from __future__ import annotations

from peftdyno.bench.task import Task
from peftdyno.bench.tasks import TASKS

_HEAD = "| task | data set | train; test split | main metric | answers | new tokens |\n|---|---|---|---|---|---|"


def table() -> str:
    """Markdown, one row a task, in the registry's order."""
    return "\n".join([_HEAD, *(_line(task) for task in TASKS.values())])


def _line(task: Task) -> str:
    source = "/".join(part for part in (task.hub_id, task.subset) if part) or "files"
    held_out = f" ({task.splits.validation} validates)" if task.splits.validation else ""
    cells = (
        task.name,
        "generated" if task.generate else source,
        f"{task.splits.train}{held_out}; {', else '.join(task.splits.test)}",
        task.metric,
        " ".join(task.labels) if task.labels else "text",
        str(task.max_new_tokens),
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(table())
