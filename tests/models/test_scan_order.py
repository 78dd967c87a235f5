"""Ways through a grid against the maps that the original code makes, and by hand."""

import golden
import numpy as np
import pytest

from vimd_jax.models.scan_order import DIRECTIONS, PADDING, reverse_map, scan_map

RECORDED = golden.tensors("c07_scan_maps")
MAPS = [name.removeprefix("scan/") for name in sorted(RECORDED) if name.startswith("scan/")]


def parse(name: str) -> tuple[str, tuple[int, int]]:
    size, direction = name.split("/")
    rows, columns = size.split("x")
    return direction, (int(rows), int(columns))


@pytest.mark.parametrize("name", MAPS)
def test_recorded_maps(name):
    direction, grid = parse(name)
    order = scan_map(direction, grid)
    published = reverse_map(direction, grid, "published")
    np.testing.assert_array_equal(order, RECORDED[f"scan/{name}"])
    np.testing.assert_array_equal(published, RECORDED[f"reverse/{name}"])
    np.testing.assert_array_equal(order[published], RECORDED[f"roundtrip/{name}"])


def test_every_direction_and_some_not_square_are_recorded():
    assert {parse(name)[0] for name in MAPS} == {*DIRECTIONS, "w3", "w3_flip"}
    assert any(rows != columns for _, (rows, columns) in map(parse, MAPS))


@pytest.mark.parametrize("grid", [(1, 1), (1, 6), (4, 4), (3, 5), (8, 3), (14, 14)], ids=str)
@pytest.mark.parametrize("direction", [*DIRECTIONS, "w1", "w3", "w10_flip"])
def test_results_return_to_their_tokens(direction, grid):
    order, places = scan_map(direction, grid), reverse_map(direction, grid)
    np.testing.assert_array_equal(order[places], np.arange(grid[0] * grid[1]))
    padding = np.delete(order, places)
    assert np.all(padding == PADDING)


def test_windows_by_hand():
    _ = PADDING
    np.testing.assert_array_equal(scan_map("v", (3, 4)), [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11])
    np.testing.assert_array_equal(scan_map("w2", (3, 4)), [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, _, _, 10, 11, _, _])
    np.testing.assert_array_equal(scan_map("w2_flip", (3, 3)), [_, _, _, 8, _, _, 7, 6, _, 5, _, 2, 4, 3, 1, 0])


@pytest.mark.parametrize("direction", ["", "x", "w", "w0", "w2_flop", "H", "w02", "h_flip_flip", "w-2"])
def test_unknown_directions_are_named(direction):
    with pytest.raises(ValueError, match=f"^directions: '{direction}' is not valid"):
        scan_map(direction, (4, 4))


def test_maps_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        scan_map("h", (2, 2))[0] = 3
