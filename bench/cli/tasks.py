"""`peftdyno tasks`: the data sets of the bench."""

from __future__ import annotations

from peftdyno.bench.cli import options as o

PANEL = "Look"
EXAMPLES = ("peftdyno tasks", "peftdyno tasks --json", "peftdyno tasks --tasks-file dataset_info.json")


def command(tasks_file: o.TasksFile = None, json_output: o.Json = False) -> None:
    """List the tasks: where their rows come from, their metric, their answers."""
    from peftdyno.bench.cli.console import ERR, print_json, print_table
    from peftdyno.bench.tasks import TASKS
    from peftdyno.bench.tasks_file import apply_tasks_file

    tasks = TASKS
    if tasks_file is not None:
        tasks, warnings = apply_tasks_file(TASKS, tasks_file)
        for warning in warnings:
            ERR.print(warning, style="yellow", highlight=False)
    if json_output:
        print_json({name: task.declaration() for name, task in tasks.items()})
        return
    rows = []
    for task in tasks.values():
        source = "generator" if task.generate else "/".join(filter(None, (task.hub_id, task.subset)))
        rows.append((task.name, task.category, task.metric, " ".join(task.labels or ("text",)), source))
    print_table(("task", "category", "metric", "answers", "rows from"), rows)
