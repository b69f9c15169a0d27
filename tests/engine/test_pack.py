"""Packs: layout, labels, shared prefixes and identities of tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftdyno.engine.pack import Pack, Root, Sequence, build_pack, path, shared_prefix_length


def sequence(*tokens: int, prompt: int = 1, run: int = 0, ordinal: int = 0) -> Sequence:
    return Sequence(tokens=tokens, num_prompt=prompt, run=run, ordinal=ordinal)


def seen_tokens(pack: Pack, leaf: int) -> list[int]:
    """Tokens on a leaf's path, in order of position."""
    rows = [
        r for i in path(pack.segments, leaf) for s in [pack.segments[i]] for r in range(s.start, s.start + s.length)
    ]
    assert pack.positions[rows].tolist() == sorted(pack.positions[rows].tolist())
    return pack.tokens[rows].tolist()


def labels_of(pack: Pack) -> list[tuple[int, int]]:
    """(token that predicts, target) of each label."""
    return list(zip(pack.tokens[pack.labels.index].tolist(), pack.labels.target.tolist(), strict=True))


def test_roots_only():
    pack = build_pack([sequence(5, 6, 7), sequence(8, 9, prompt=0)])
    assert pack.tokens.tolist() == [5, 6, 7, 8, 9]
    assert pack.positions.tolist() == [0, 1, 2, 0, 1]
    assert labels_of(pack) == [(5, 6), (6, 7), (8, 9)]
    assert pack.layout.pairs() == 6 + 3
    assert pack.layout.pairs(full=True) == 9 + 4
    assert pack.layout.pairs(window=2) == 1 + 2 + 2 + 1 + 2


def test_shared_prefix_is_computed_once():
    pack = build_pack([sequence(1, 2, 3, 4, prompt=2), sequence(1, 2, 5, 6, 7, prompt=3)], share_prefix=True)
    assert pack.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert pack.positions.tolist() == [0, 1, 2, 3, 2, 3, 4]
    assert labels_of(pack) == [(2, 3), (3, 4), (5, 6), (6, 7)]
    assert pack.layout.pairs() == (1 + 2) + (3 + 4) + (3 + 4 + 5)


def test_label_predicted_by_the_prefix_keeps_one_row_for_all():
    pack = build_pack([sequence(1, 2, 3), sequence(1, 2, 4)], share_prefix=True)
    assert labels_of(pack) == [(1, 2), (2, 3), (1, 2), (2, 4)]
    assert pack.labels.rows.tolist() == [0, 1]
    assert pack.labels.rows[pack.labels.place].tolist() == pack.labels.index.tolist()


def test_equal_sequences_leave_each_a_token():
    sequences = [sequence(1, 2, 3), sequence(1, 2, 3)]
    assert shared_prefix_length([s.tokens for s in sequences]) == 2
    pack = build_pack(sequences, share_prefix=True)
    assert [seen_tokens(pack, leaf) for leaf in pack.leaves] == [[1, 2, 3], [1, 2, 3]]


def test_losses_need_no_row_for_a_last_target():
    sequences = [sequence(1, 2, 3, 4, prompt=3), sequence(1, 2, 5, prompt=3), sequence(1, 2, 6, 7)]
    pack = build_pack(sequences, losses_only=True)
    assert pack.tokens.tolist() == [1, 2, 3, 1, 2, 5, 1, 2, 6]
    assert labels_of(pack) == [(3, 4), (1, 2), (2, 6), (6, 7)]
    shared = build_pack(sequences, share_prefix=True, losses_only=True)
    assert shared.tokens.tolist() == [1, 2, 3, 5, 6]
    assert labels_of(shared) == labels_of(pack)


def test_runs_are_contiguous_and_never_share():
    pack = build_pack(
        [sequence(1, 2, run=1), sequence(1, 3, run=0), sequence(1, 4, run=1)], num_runs=3, share_prefix=True
    )
    assert pack.runs.offsets == (0, 2, 5, 5)
    assert pack.tokens.tolist() == [1, 3, 1, 2, 4]
    assert pack.labels.run_offsets == (0, 1, 3, 3)
    assert pack.labels.row_runs.offsets == (0, 1, 2, 2)


@pytest.mark.parametrize("kind", ["tokens", "keys"])
def test_learned_root_moves_positions(kind):
    pack = build_pack([sequence(1, 2), sequence(1, 3, run=1)], num_runs=2, root=Root(kind=kind, length=4))
    virtual = 4 if kind == "tokens" else 0
    assert pack.num_tokens == 2 * (virtual + 2)
    assert pack.virtual_index.tolist() == list(range(2 * virtual))
    own = pack.positions[pack.tokens >= 0]
    assert own.tolist() == [4, 5, 4, 5]
    inner = 4 * 5 // 2 if virtual else 0
    assert pack.layout.pairs() == 2 * (inner + 5 + 6)


def test_identity_of_a_token_does_not_depend_on_the_pack():
    alone = build_pack([sequence(7, 8, ordinal=3)])
    among = build_pack([sequence(1, 2, 3), sequence(7, 8, ordinal=3, run=1)], num_runs=2)
    assert alone.runs.streams is not None and among.runs.streams is not None
    assert among.runs.streams[3:].tolist() == alone.runs.streams.tolist()


@pytest.mark.parametrize("bad", [sequence(), sequence(1, run=2), sequence(1, run=-1)])
def test_bad_sequences_are_refused(bad):
    with pytest.raises(ValueError, match="sequence 0"):
        build_pack([bad], num_runs=2)


tokens = st.lists(st.integers(0, 2), min_size=1, max_size=8)
batches = st.lists(st.tuples(tokens, st.integers(0, 8), st.integers(0, 2)), min_size=1, max_size=6)


@settings(deadline=None, max_examples=200)
@given(batches, st.booleans(), st.booleans())
def test_every_sequence_sees_itself(batch, share, losses_only):
    sequences = [Sequence(tokens=tuple(t), num_prompt=p, run=r, ordinal=i) for i, (t, p, r) in enumerate(batch)]
    pack = build_pack(sequences, num_runs=3, share_prefix=share, losses_only=losses_only)
    rows = [list(s.inputs() if losses_only else s.tokens) for s in sequences]
    assert [seen_tokens(pack, leaf) for leaf in pack.leaves] == rows
    count = sum(max(len(s.tokens) - max(s.num_prompt, 1), 0) for s in sequences)
    assert pack.labels.index.numel() == count
    assert pack.labels.rows.tolist() == sorted(set(pack.labels.index.tolist()))
    if not share:
        assert pack.num_tokens == sum(map(len, rows))
        assert pack.layout.pairs() == sum(len(row) * (len(row) + 1) // 2 for row in rows)
    assert torch.equal(pack.to("cpu").tokens, pack.tokens)
