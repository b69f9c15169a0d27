"""The loop: equal to plain PyTorch + PEFT, exact under accumulation, kills, out of memory and broken runs."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from peftdyno.engine import train as loop
from peftdyno.engine.batching import batch_indices, fit, steps_per_epoch
from peftdyno.engine.errors import UserError
from peftdyno.engine.optim import OptimConfig
from peftdyno.engine.tape import unavailable
from peftdyno.engine.train import TrainConfig, train

from .tiny_job import CONFIG, examples, job, run_job, tiny_bank, tiny_decoder


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path, run: int = 0) -> torch.Tensor:
    return torch.tensor([math.nan if (loss := record["loss"][run]) is None else loss for record in metrics(folder)])


def trained(folder: Path, data=None, seeds=(0,), dropout=0.1, methods=None, **options):
    decoder = tiny_decoder()
    bank = methods or tiny_bank(decoder, seeds, dropout=dropout)
    state = train(decoder, bank, data or [job()], TrainConfig(**options), folder)
    return state, losses(folder)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_loss_falls(tmp_path):
    _, found = trained(tmp_path, [job(steps=60, rate=2e-2)])
    assert found[-5:].mean() < found[:5].mean() - 0.3


def test_losses_equal_a_plain_peft_loop(tmp_path):
    """20 steps of AdamW, clipping, warm-up and cosine against torch.optim and PEFT on the same model."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    decoder = tiny_decoder()
    data = job(steps=20)
    bank = tiny_bank(decoder, dropout=0.0)
    start = {name: value.detach().clone() for name, value in bank.parameters.items()}
    train(decoder, bank, [data], TrainConfig(evaluate_every=0), tmp_path)

    from peftdyno.engine.weight_files import to_state_dict

    hf = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=CONFIG.rms_norm_eps, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(hf).float()
    model.load_state_dict(to_state_dict(decoder.weights, CONFIG), strict=True)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["k_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in start.items():
            _, layer, module, factor = name.split(".")
            block = "mlp" if module == "down_proj" else "self_attn"
            named[f"base_model.model.model.layers.{layer}.{block}.{module}.lora_{factor}.default.weight"].copy_(
                value[0]
            )
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=data.optim.learning_rate, weight_decay=1e-5)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 2, 20)
    theirs = []
    for step in range(20):
        rows = [data.train[i] for i in batch_indices(len(data.train), data.batch, 0, step)]
        width = max(len(r.tokens) for r in rows)
        ids = torch.tensor([[*r.tokens, *[0] * (width - len(r.tokens))] for r in rows])
        labels = torch.tensor(
            [[*[-100] * r.num_prompt, *r.tokens[r.num_prompt :], *[-100] * (width - len(r.tokens))] for r in rows]
        )
        mask = torch.tensor([[1] * len(r.tokens) + [0] * (width - len(r.tokens)) for r in rows])
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        theirs.append(loss.item())
    torch.testing.assert_close(losses(tmp_path), torch.tensor(theirs), rtol=1e-4, atol=0)


def test_accumulation_equals_the_large_batch(tmp_path):
    whole = trained(tmp_path / "whole", [job(batch=5)])
    parts = trained(tmp_path / "parts", [job(batch=5)], micro_batch=2)
    assert relative(parts[1], whole[1]) < 1e-5
    assert relative(parts[0].bank.flat, whole[0].bank.flat) < 1e-5


def test_shared_prefix_trains_the_same(tmp_path):
    apart = trained(tmp_path / "apart", dropout=0.0, share_prefix="off")
    shared = trained(tmp_path / "shared", dropout=0.0, share_prefix="auto")
    tokens = [sum(record["tokens"] for record in metrics(tmp_path / name)) for name in ("apart", "shared")]
    assert tokens[1] < tokens[0]
    assert relative(shared[1], apart[1]) < 1e-5
    assert relative(shared[0].bank.flat, apart[0].bank.flat) < 1e-5


@pytest.mark.parametrize(
    "graphs",
    ["off", pytest.param("on", marks=pytest.mark.skipif(bool(unavailable()), reason="the C++ kernels are not built"))],
)
def test_runs_together_equal_runs_alone(tmp_path, graphs):
    """Also where both are replayed, as long trainings are."""
    jobs = [job(steps=50), job(steps=50, seed=3, rate=1e-3), job(steps=20, batch=2)]
    together, _ = trained(tmp_path / "together", jobs, seeds=(0, 5, 9), graphs=graphs)
    for j, seed in enumerate((0, 5, 9)):
        folder = tmp_path / f"alone-{j}"
        alone, found = trained(folder, [jobs[j]], seeds=(seed,), graphs=graphs)
        assert relative(losses(tmp_path / "together", j)[: jobs[j].steps], found) < 1e-5
        assert relative(together.bank.flat[j], alone.bank.flat[0]) < 1e-5


def test_a_broken_run_leaves_the_others_untouched(tmp_path):
    wild = job(steps=30, rate=1e30)
    together, _ = trained(tmp_path / "together", [wild, job(steps=30)], seeds=(0, 1))
    alone, _ = trained(tmp_path / "alone", [job(steps=30)], seeds=(1,))
    assert "step" in together.runs[0].stopped and not together.runs[1].stopped
    assert together.bank.flat.isfinite().all()
    assert relative(together.bank.flat[1], alone.bank.flat[0]) < 1e-5
    assert any("run 0 stopped" in event for event in together.events)


def test_out_of_memory_halves_the_micro_batch(tmp_path, monkeypatch):
    real = loop.forward_backward

    def limited(decoder, bank, packs, *rest):
        if max(len(pack.leaves) for pack in packs) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return real(decoder, bank, packs, *rest)

    expected = trained(tmp_path / "roomy")
    monkeypatch.setattr(loop, "forward_backward", limited)
    found = trained(tmp_path / "tight")
    assert found[0].micro_batch == 2 and "micro-batch is now 2" in found[0].events[0]
    assert relative(found[0].bank.flat, expected[0].bank.flat) < 1e-5


def test_out_of_memory_at_one_sequence_says_what_is_kept(tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(loop, "forward_backward", full)
    with pytest.raises(UserError, match=r"checkpoints in .* are kept"):
        trained(tmp_path)


def test_another_error_is_not_taken_for_lack_of_memory(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(loop, "forward_backward", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        trained(tmp_path)


def bits(folder: Path) -> tuple[list[dict], list[bytes]]:
    """Metrics, and the newest checkpoint's bytes."""
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    return metrics(folder), [(newest / name).read_bytes() for name in ("state.safetensors", "state.json")]


def test_killed_at_random_moments_ends_with_the_same_bits(tmp_path, threads):
    """kill -9 of the training process, again and again, until it gets through."""
    threads(1)
    run_job(tmp_path / "whole")
    program = [sys.executable, "-m", "tests.engine.tiny_job", str(tmp_path / "killed")]
    draw, kills = random.Random(1), 0
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2] / "tests" / "offline")])}
    while kills < 4:
        process = subprocess.Popen(program, cwd=Path(__file__).parents[2], env=environment)
        _wait_for_steps(tmp_path / "killed", process, kills * 8 + draw.randrange(1, 8))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    state = run_job(tmp_path / "killed")
    assert kills >= 2 and state.step == 40
    assert bits(tmp_path / "killed") == bits(tmp_path / "whole")
    assert not list((tmp_path / "killed" / "checkpoints").glob(".partial*"))


def _wait_for_steps(folder: Path, process: subprocess.Popen, steps: int) -> None:
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        file = folder / "metrics.jsonl"
        if file.exists() and file.read_bytes().count(b"\n") >= steps:
            return
        time.sleep(0.002)


@pytest.mark.parametrize("step", [3, 17, 39])
def test_interrupted_anywhere_ends_with_the_same_bits(tmp_path, monkeypatch, threads, step):
    threads(1)
    run_job(tmp_path / "whole")
    real = loop.forward_backward

    def dies(decoder, bank, packs, at, *rest):
        if at == step:
            raise KeyboardInterrupt
        return real(decoder, bank, packs, at, *rest)

    monkeypatch.setattr(loop, "forward_backward", dies)
    with pytest.raises(KeyboardInterrupt):
        run_job(tmp_path / "cut")
    monkeypatch.setattr(loop, "forward_backward", real)
    run_job(tmp_path / "cut")
    assert bits(tmp_path / "cut") == bits(tmp_path / "whole")


def test_a_corrupt_checkpoint_falls_back_and_says_so(tmp_path):
    run_job(tmp_path / "whole")
    run_job(tmp_path / "hurt")
    newest = sorted((tmp_path / "hurt" / "checkpoints").glob("step-*"))[-1]
    content = bytearray((newest / "state.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "state.safetensors").write_bytes(content)
    state = run_job(tmp_path / "hurt")
    assert any("does not load" in event for event in state.events)
    assert torch.equal(state.bank.flat, run_job(tmp_path / "whole").bank.flat)


def test_another_jobs_folder_is_refused(tmp_path):
    run_job(tmp_path)
    decoder = tiny_decoder()
    with pytest.raises(UserError, match="another job"):
        train(decoder, tiny_bank(decoder), [job()], TrainConfig(), tmp_path, fingerprint="other")


def test_every_example_once_an_epoch():
    for n, batch in [(10, 3), (7, 7), (5, 8)]:
        per = steps_per_epoch(n, batch)
        epochs = [[i for s in range(per) for i in batch_indices(n, batch, 1, e * per + s)] for e in range(2)]
        assert [sorted(e) for e in epochs] == [list(range(n))] * 2
    assert batch_indices(100, 10, 1, 0) != batch_indices(100, 10, 2, 0)


def test_a_long_example_loses_the_middle_of_its_prompt():
    example = fit(range(10), (100, 101), 8)
    assert example.tokens == (0, 1, 2, 7, 8, 9, 100, 101) and example.num_prompt == 6 and example.cut == 4
    assert fit(range(3), (5,), 8).cut == 0
    with pytest.raises(ValueError, match="no room"):
        fit((1,), range(8), 8)


def test_schedule():
    config = OptimConfig(learning_rate=1.0)
    rates = [config.rate(step, 20) for step in range(21)]
    assert rates[:3] == [0.0, 0.5, 1.0] and rates[20] == pytest.approx(0.0, abs=1e-12)
    assert rates[11] == pytest.approx(0.5)
    assert OptimConfig(learning_rate=1.0, schedule="constant").rate(19, 20) == 1.0


def test_empty_data_is_refused():
    with pytest.raises(UserError, match="no training example"):
        loop.RunData(train=[], validation=examples(1), optim=OptimConfig(learning_rate=1.0), steps=1, batch=1)
