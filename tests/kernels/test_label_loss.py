"""Head and cross-entropy in C++."""

import pytest
import torch


@pytest.mark.parametrize(
    ("labels", "vocabulary"), [(0, 5), (1, 3), (63, 1000), (127, 127), (300, 257), (70, 1024), (400, 4096)]
)
@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize("gradient", [False, True])
def test_shapes(check, rows, dtype, labels, vocabulary, softcap, gradient) -> None:
    x, head = rows(labels, 48, dtype, spare=4), rows(vocabulary, 48, dtype)
    check("label_loss", x, head, torch.randint(vocabulary, (labels,)), softcap, gradient)


def test_the_same_bits_on_two_threads(isa, rows, dtype, threads) -> None:
    own = dtype == torch.bfloat16 and isa != "portable"  # else the library's, whose order of sums is not ours to say
    given = rows(70, 64, dtype), rows(4096, 64, dtype), torch.randint(4096, (70,)), 0.0, True
    alone = torch.ops.peftdyno_cpu.label_loss(*given)
    threads(2)
    for _ in range(3):
        for again, before in zip(torch.ops.peftdyno_cpu.label_loss(*given), alone, strict=True):
            allowed = 0.0 if own else 8 * torch.finfo(dtype).eps
            assert float((again - before).norm()) <= allowed * float(before.norm())


@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_extreme_logits(check, rows, dtype, softcap) -> None:
    x = 100 * rows(9, 32, dtype)
    check("label_loss", x, rows(200, 32, dtype), torch.arange(9), softcap, True)


@pytest.mark.parametrize("target", [-1, 7])
def test_target_outside_the_vocabulary(isa, rows, target) -> None:
    with pytest.raises(RuntimeError, match="outside a vocabulary of 7"):
        torch.ops.peftdyno_cpu.label_loss(
            rows(1, 8, torch.float32), rows(7, 8, torch.float32), torch.tensor([target]), 0.0, True
        )
