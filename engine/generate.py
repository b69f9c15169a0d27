"""Greedy generation of a batch: prompts as one pack whose shared beginning is computed once, then a token a step."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

import torch
from torch import Tensor

from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.cache import KVCache
from peftdyno.engine.decoder import Decoder
from peftdyno.engine.graphs import DecodeGraphs, GraphChoice, Recorder, Step, recorder_for, warn_once
from peftdyno.engine.pack import Pack, Sequence, build_pack
from peftdyno.kernels.adapted_linear import TokenRuns
from peftdyno.kernels.attention import AttentionLayout


@torch.no_grad()
def generate(
    decoder: Decoder,
    bank: AdapterBank,
    prompts: SequenceOf[Sequence],
    *,
    max_new_tokens: int,
    eos_ids: Collection[int],
    share_prefix: bool = True,
    graphs: GraphChoice | Recorder = "auto",
) -> list[list[int]]:
    """Greedy continuation of each prompt, without its end token; sequences are the prompts, `run` names the adapter.

    Each ends at a token of `eos_ids` or after `max_new_tokens`. The result of a prompt does not depend on the
    others in the batch (to rounding). `graphs` says whether decoding steps are recorded and replayed (`recorder_for`).
    """
    order = sorted(range(len(prompts)), key=lambda i: prompts[i].run)
    ordered = [prompts[i] for i in order]
    with decoder.scope.within(phase="data", layer=-1):
        pack = build_pack(ordered, num_runs=bank.num_runs, share_prefix=share_prefix, root=bank.root)
        pack = pack.to(decoder.device)
    with decoder.scope.within(phase="prefill", owner="adapter", layer=-1):
        bank.begin(0, training=False)
    with decoder.scope.within(phase="prefill"):
        cache = KVCache(decoder.config, pack, max_new_tokens, decoder.dtype, decoder.device)
        ends = [pack.segments[leaf].start + pack.segments[leaf].length - 1 for leaf in pack.leaves]
        logits = decoder.logits(pack, bank, rows=ends, cache=cache)
    generated: list[list[int]] = [[] for _ in ordered]
    live = list(range(len(ordered)))
    lengths = [len(s.tokens) + (bank.root.length if bank.root else 0) for s in ordered]
    decoding = _Decoding(decoder, bank, pack, cache, recorder_for(graphs, decoder.device, max_new_tokens), graphs)
    with decoder.scope.within(phase="decode"):
        while True:
            tokens = logits.max(-1).indices.tolist()  # argmax takes longer in bf16
            for i, token in zip(live, tokens, strict=True):
                generated[i].append(token)
            going = [k for k, i in enumerate(live) if tokens[k] not in eos_ids and len(generated[i]) < max_new_tokens]
            if not going:
                break
            live = [live[k] for k in going]
            made = [len(generated[i]) - 1 for i in live]
            positions = [lengths[i] + n for i, n in zip(live, made, strict=True)]
            runs = [ordered[i].run for i in live]
            logits = decoding.logits(Step(live, made, [tokens[k] for k in going], positions, runs))
    return _in_order(generated, order, eos_ids)


class _Decoding:
    """Logits of a step: replayed where there is a recorder, else computed by launching every kernel."""

    def __init__(
        self,
        decoder: Decoder,
        bank: AdapterBank,
        pack: Pack,
        cache: KVCache,
        recorder: Recorder | None,
        choice: GraphChoice | Recorder,
    ) -> None:
        self.decoder, self.bank, self.pack, self.cache = decoder, bank, pack, cache
        self.may_give_up = choice == "auto"
        self.graphs = None if recorder is None else DecodeGraphs(decoder, bank, pack, cache, recorder)

    def logits(self, step: Step) -> Tensor:
        """[L, V] of the live sequences."""
        if self.graphs is not None:
            try:
                return self.graphs.logits(step)
            except RuntimeError as error:
                if not self.may_give_up or isinstance(error, torch.OutOfMemoryError):
                    raise
                warn_once(error)
                self.graphs = None
        self.cache.advance(step.sequences, step.made)
        return self.decoder.logits(_decode_pack(self.pack, step), self.bank, cache=self.cache)


def _decode_pack(pack: Pack, step: Step) -> Pack:
    """One new token of each live sequence; what it attends to is in the cache's layout."""
    device = pack.tokens.device
    counts = [step.runs.count(j) for j in range(pack.num_runs)]
    offsets = tuple(sum(counts[:j]) for j in range(pack.num_runs + 1))
    none = torch.empty(0, dtype=torch.int64, device=device)
    return replace(
        pack,
        tokens=torch.tensor(step.tokens, device=device),
        positions=torch.tensor(step.positions, device=device),
        runs=TokenRuns(offsets=offsets),
        layout=AttentionLayout(torch.empty(0, 4, dtype=torch.int32), torch.empty(0, 3, dtype=torch.int32)),
        virtual_rows=none,
        virtual_index=none,
    )


def _in_order(generated: list[list[int]], order: list[int], eos_ids: Collection[int]) -> list[list[int]]:
    """Results in the order of the prompts, end tokens taken off."""
    results: list[list[int]] = [[] for _ in order]
    for tokens, i in zip(generated, order, strict=True):
        results[i] = tokens[:-1] if tokens and tokens[-1] in eos_ids else tokens
    return results
