"""Orders of traversal of a grid against the original code's maps, and by hand."""

import golden
import jax.numpy as jnp
import numpy as np
import pytest

from vimd_jax.models.scan_order import (
    DIRECTIONS,
    PADDING,
    local_scan_order,
    reverse_map,
    scan_map,
    stack_orders,
    sum_visits,
    to_sequences,
    to_tokens,
)

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


@pytest.mark.parametrize("class_token", ["middle", "head", None])
def test_orders_of_several_directions(class_token):
    """Tokens reach their positions in every sequence and return from there, with any padding."""
    grid, directions = (3, 5), ("h", "v_flip", "w2", "w7_flip")
    order = local_scan_order(directions, grid, class_token)
    count = 15 + (class_token is not None)
    assert order.places.shape == (4, count)
    assert order.tokens.shape == (4, 49 + (class_token is not None))
    for k, direction in enumerate(directions):
        sequence = order.tokens[k]
        np.testing.assert_array_equal(np.sort(sequence[sequence != PADDING]), np.arange(count))
        np.testing.assert_array_equal(order.tokens.reshape(-1)[order.places[k]], np.arange(count))
        patches = np.delete(np.arange(count), {"middle": 7, "head": 0, None: []}[class_token])
        path = scan_map(direction, grid)
        scanned = [token for token in sequence if token in patches]
        np.testing.assert_array_equal(scanned, patches[path[path != PADDING]])

    tokens = np.random.default_rng(0).normal(size=(2, count, 3)).astype(np.float32)
    sequences = to_sequences(jnp.asarray(tokens), order)
    assert not np.any(np.asarray(sequences).swapaxes(1, 2)[order.tokens == PADDING])
    np.testing.assert_array_equal(to_tokens(sequences, order), np.stack([tokens] * 4))
    np.testing.assert_allclose(sum_visits(to_tokens(sequences, order)), 4 * tokens, rtol=1e-6)


def test_where_class_tokens_are_scanned():
    middle = local_scan_order(("h", "h_flip", "w2", "w2_flip"), (3, 3), "middle").tokens
    assert [np.flatnonzero(sequence == 4).tolist() for sequence in middle] == [[4]] * 4  # also in padded sequences
    head = local_scan_order(("h", "h_flip", "w2", "w2_flip"), (3, 3), "head").tokens
    assert [np.flatnonzero(sequence == 0).tolist() for sequence in head] == [[0], [9], [0], [16]]


def test_stacked_orders_have_one_length():
    orders = [local_scan_order(("h", "v"), (3, 3)), local_scan_order(("w2", "h"), (3, 3))]
    stacked = stack_orders(orders)
    assert stacked.tokens.shape == (2, 2, 16) and stacked.places.shape == (2, 2, 9)
    np.testing.assert_array_equal(stacked.tokens[0, :, :9], orders[0].tokens)
    assert np.all(stacked.tokens[0, :, 9:] == PADDING)
    for tokens, places in zip(*stacked):
        np.testing.assert_array_equal(tokens.reshape(-1)[places], [range(9)] * 2)


def test_maps_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        scan_map("h", (2, 2))[0] = 3
