"""Tiles: shipped for every architecture, overridden by what was measured, and never trusted unread."""

from pathlib import Path

import pytest
import torch

from peftdyno.kernels import tuning
from peftdyno.kernels.triton import tune
from peftdyno.kernels.tuning import Tile

CPU = torch.device("cpu")


def test_every_kernel_ships_a_tile_for_every_architecture() -> None:
    for kernel, tiles in tuning.SHIPPED.items():
        assert sorted(tiles) == [80, 90, 100], kernel
        for tile in tiles.values():
            assert tile.rows & (tile.rows - 1) == tile.columns & (tile.columns - 1) == 0, (kernel, tile)


def test_a_trial_ends() -> None:
    tile = Tile(16, 16, 4, 1)
    with tuning.trial("lora_add", tile):
        assert tuning.tile("lora_add", CPU) == tile
    assert tuning.tile("lora_add", CPU) == tuning.SHIPPED["lora_add"][90]


def test_measured_tiles_are_saved_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tile = Tile(64, 64, 4, 2)
    file = tuning.save(CPU, {"lora_add": {"tile": tile, "ms": 1.0}})
    tuning.save(CPU, {"lora_outer": {"tile": tile, "ms": 2.0}})
    assert tuning._measured(file) == {"lora_add": tile, "lora_outer": tile}
    file.write_text('{"lora_add": {"tile": {"rows": 1}}}')
    tuning._measured.cache_clear()
    with pytest.raises(ValueError, match="delete it and run"):
        tuning._measured(file)


def test_every_tile_has_a_subject_and_candidates(device: torch.device) -> None:
    sizes = tune.TuneSizes(tokens=20, width=16, out=16, rank=16, heads=2, key_heads=1, head_dim=16)
    names = {subject.kernel for subject in tune.subjects(sizes, device)}
    others = {name for name in tuning.SHIPPED if name.split("/")[-1] in ("128", "256", "decode")}
    assert names == set(tuning.SHIPPED) - others
    for kernel, tiles in tuning.SHIPPED.items():
        found = tune.candidates(tiles[90])
        assert found[0] == tiles[90] and len(set(found)) == len(found) > 4, kernel
