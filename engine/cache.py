"""KVCache: keys and values of a pack of prompts and of what is generated after them.

Rows 0:N are the pack's; sequence i then owns the `room` rows from N + i * room on; the last row is nobody's. A
generated token sees its prompt's path in full and its own rows causally, so a prefix shared by all prompts is stored
and computed once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.pack import Pack, key_range, path
from peftdyno.kernels import attention, rotary
from peftdyno.kernels.attention import AttentionLayout, AttentionShape


class KVCache:
    """Keys and values [layers, T, 2, K, d], the rows that the tokens now running write, and what they may see."""

    def __init__(self, config: DecoderConfig, pack: Pack, room: int, dtype: torch.dtype, device: torch.device) -> None:
        self.room = room
        self.num_prompt_rows = pack.num_tokens
        rows = pack.num_tokens + len(pack.leaves) * room + 1
        shape = (config.num_hidden_layers, rows, 2, config.num_key_value_heads, config.head_dim)
        self.storage = torch.empty(shape, dtype=dtype, device=device)
        self._paths = [[key_range(pack.segments[j], rows) for j in path(pack.segments, leaf)] for leaf in pack.leaves]
        self.write = torch.arange(pack.num_tokens, device=device)
        self.layout = _shifted(pack.layout, rows - pack.num_tokens, pack.num_tokens)

    def advance(self, sequences: Sequence[int], lengths: Sequence[int]) -> None:
        """The next rows are one token of each of `sequences`, which have generated `lengths` tokens before."""
        write, table, chain = self.tables(sequences, lengths)
        self.write = torch.tensor(write, device=self.storage.device)
        self.layout = AttentionLayout(torch.tensor(table, dtype=torch.int32), torch.tensor(chain, dtype=torch.int32))

    @property
    def spare_row(self) -> int:
        """The row that is nobody's."""
        return self.storage.shape[1] - 1

    def tables(
        self, sequences: Sequence[int], lengths: Sequence[int]
    ) -> tuple[list[int], list[tuple[int, ...]], list[tuple[int, int, int]]]:
        """(row that each next token writes, segments, chain of the layout); a sequence -1 stands for padding, which
        writes and sees the row that is nobody's."""
        table: list[tuple[int, ...]] = []
        chain: list[tuple[int, int, int]] = []
        write: list[int] = []
        for row, (i, length) in enumerate(zip(sequences, lengths, strict=True)):
            first = len(chain)
            if i < 0:
                chain.append((self.spare_row, 1, 0))
                write.append(self.spare_row)
            else:
                start = self.num_prompt_rows + i * self.room
                chain += self._paths[i]
                _, keys, position = self._paths[i][-1]
                chain.append((start, length + 1, position + keys))
                write.append(start + length)
            table.append((row, 1, first, len(chain)))
        return write, table, chain

    def attend(
        self,
        layer: int,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        shape: AttentionShape,
        prefix: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """Turn the rows, store their keys and values, and attend over the cache: [N, H d]."""
        rotary.ROTARY(qkv, cos, sin, shape.num_heads + shape.num_key_value_heads, False)
        stored = self.storage[layer]
        q, fresh = shape.heads(qkv).split((shape.num_heads, 2 * shape.num_key_value_heads), 1)
        stored.flatten(1, 2).index_copy_(0, self.write, fresh)  # keys and values of a row in one go
        keys, values = stored.unbind(1)
        prefix_k, prefix_v = prefix if prefix is not None else (None, None)
        layout = self.layout
        out, _ = attention.FORWARD(
            q, keys, values, prefix_k, prefix_v, layout.segments, layout.chain, *shape.score_options(), 0
        )
        result: Tensor = out
        return result


def _shifted(layout: AttentionLayout, shift: int, num_rows: int) -> AttentionLayout:
    """The pack's layout with the rows of learned prefixes moved behind the cache's rows."""
    chain = layout.chain.clone()
    chain[chain[:, 0] >= num_rows, 0] += shift
    return AttentionLayout(layout.segments, chain)
