"""The instruction sets by name."""

import platform

import pytest

from peftdyno.kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.AVAILABLE, reason="the C++ kernels are not built")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="elsewhere only the portable one is compiled")
def test_names_are_those_of_the_kernels() -> None:
    """A name of ours that the kernels do not know would skip its tests everywhere."""
    with pytest.raises(ValueError, match=f"'tubes' is not one of {', '.join(cpu.INSTRUCTION_SETS)}$"):
        cpu.use_instruction_set("tubes")


def test_asking_which_run_here_changes_nothing(isa) -> None:
    assert cpu.instruction_set() == isa
    assert "portable" in cpu.instruction_sets()
    assert cpu.instruction_set() == isa
