"""Data flow of a Python program: where each value comes from (as GraphCodeBERT has it, arXiv:2009.08366)."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field

MAX_DOUBLE_LOOPS = 3

Flow = tuple[str, str, tuple[str, ...]]


@dataclass
class Use:
    """One place where a name or constant stands, and the places its value comes from."""

    name: str
    relation: str
    sources: dict[int, str] = field(default_factory=dict)


def flows(tree: ast.Module) -> list[Flow]:
    """(variable, relation, sources) of each place that has a source or is one.

    Variables are numbered by first appearance, so that renaming them changes nothing. A loop's body is
    followed twice, for values carried from one turn to the next; of deeply nested loops the inner ones once.
    """
    reader = _Reader()
    reader.visit(tree)
    linked = {place for place, use in reader.uses.items() if use.sources}
    linked |= {source for use in reader.uses.values() for source in use.sources}
    numbers: dict[str, str] = {}
    found = []
    for place in sorted(linked):
        use = reader.uses[place]
        for name in (*use.sources.values(), use.name):
            numbers.setdefault(name, f"var_{len(numbers)}")
        sources = tuple(sorted({numbers[name] for name in use.sources.values()}))
        found.append((numbers[use.name], use.relation, sources))
    return found


class _Reader(ast.NodeVisitor):
    """Follows a tree in order of evaluation; `state` holds the places where a variable may have been set."""

    def __init__(self) -> None:
        self.places: dict[tuple[int, int, str], int] = {}
        self.uses: dict[int, Use] = {}
        self.state: dict[str, set[int]] = {}
        self.loops = 0

    def place(self, node: ast.Name | ast.Constant | ast.arg) -> int:
        name = token(node)
        place = self.places.setdefault((node.lineno, node.col_offset, name), len(self.places))
        self.uses.setdefault(place, Use(name, "comesFrom"))
        return place

    def visit_Name(self, node: ast.Name) -> None:
        place = self.place(node)
        if node.id in self.state:
            self.uses[place].sources |= dict.fromkeys(self.state[node.id], node.id)
        else:
            self.state[node.id] = {place}

    def visit_Constant(self, node: ast.Constant) -> None:
        self.place(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        if not (isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)):
            self.visit(node.value)

    def visit_arg(self, node: ast.arg) -> None:
        self.state[node.arg] = {self.place(node)}

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        for target in node.targets:
            self.assign(target, node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.visit(node.value)
        self.assign(node.target, node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)
            self.assign(node.target, node.value)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.visit(node.value)
        self.assign(node.target, node.value)

    def visit_If(self, node: ast.If) -> None:
        self.visit(node.test)
        before = self.state
        self.state = dict(before)
        self.visit_all(node.body)
        after_body, self.state = self.state, dict(before)
        self.visit_all(node.orelse)
        for name, places in after_body.items():
            self.state[name] = self.state.get(name, set()) | places

    def visit_For(self, node: ast.For | ast.AsyncFor) -> None:
        for _ in range(self.enter_loop()):
            self.visit(node.iter)
            self.assign(node.target, node.iter)
            self.visit_all(node.body)
        self.loops -= 1
        self.visit_all(node.orelse)

    visit_AsyncFor = visit_For

    def visit_While(self, node: ast.While) -> None:
        for _ in range(self.enter_loop()):
            self.visit(node.test)
            self.visit_all(node.body)
        self.loops -= 1
        self.visit_all(node.orelse)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self.visit(node.iter)
        self.assign(node.target, node.iter)
        self.visit_all(node.ifs)

    def visit_ListComp(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp) -> None:
        self.visit_all(node.generators)
        self.visit(node.elt)

    visit_SetComp = visit_ListComp
    visit_GeneratorExp = visit_ListComp

    def visit_DictComp(self, node: ast.DictComp) -> None:
        self.visit_all(node.generators)
        self.visit_all([node.key, node.value])

    def visit_all(self, nodes: list[ast.AST]) -> None:
        for node in nodes:
            self.visit(node)

    def enter_loop(self) -> int:
        """How often to follow the loop just entered."""
        self.loops += 1
        return 2 if self.loops <= MAX_DOUBLE_LOOPS else 1

    def assign(self, target: ast.expr, value: ast.expr) -> None:
        """Every token of the target is computed from every token of the value; equal tuples pair up."""
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            for left, right in zip(target.elts, value.elts, strict=True):
                self.assign(left, right)
            return
        sources = {self.place(node): token(node) for node in tokens(value)}
        for node in tokens(target):
            place = self.place(node)
            self.uses[place].relation = "computedFrom"
            self.uses[place].sources |= sources
            self.state[token(node)] = {place}


def tokens(node: ast.AST) -> list[ast.Name | ast.Constant]:
    """Names and constants below a node, in reading order."""
    found = [child for child in ast.walk(node) if isinstance(child, ast.Name | ast.Constant)]
    return sorted(found, key=lambda child: (child.lineno, child.col_offset))


def token(node: ast.Name | ast.Constant | ast.arg) -> str:
    """What stands in the code."""
    if isinstance(node, ast.Constant):
        return repr(node.value)
    return node.id if isinstance(node, ast.Name) else node.arg
