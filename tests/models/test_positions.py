"""Resizing of position tables against recorded PyTorch values, and the positions of class tokens."""

import golden
import numpy as np
import pytest

from vimd_jax.models.positions import bicubic_matrix, class_token_positions, insert_tokens, resize_positions


@pytest.mark.parametrize(
    ("samples", "size", "expected"),
    [  # torch.nn.functional.interpolate(mode="bicubic", align_corners=False)
        ([1, 3, 2, 5], 7, [0.801567, 1.742985, 2.931760, 2.406250, 2.125456, 3.916272, 5.297649]),
        (np.arange(8) ** 2, 3, [0.596065, 12.125, 38.820602]),
        (np.arange(14) ** 2, 27, [-0.10409, 0.1301, 0.5297, 1.74072, 3.15278, 5.58611]),
    ],
)
def test_bicubic_is_pytorch_s(samples, size, expected):
    resized = bicubic_matrix(len(samples), size) @ np.array(samples, np.float32)
    np.testing.assert_allclose(resized[: len(expected)], expected, atol=2e-5)


@pytest.mark.parametrize("case", golden.cases("c06_posembed_*"))
def test_recorded_tables(case):
    """The originals resize as if the class token were at the head, wherever it is."""
    io, options = golden.tensors(case), golden.meta(case)["constructor"]
    grid = (options["orig_grid"], options["orig_grid"])
    table = resize_positions(io["pos_embed_checkpoint"], grid, tuple(options["new_grid"]), "head")
    assert golden.relative_error(table, io["pos_embed_new"]) < 1e-5


@pytest.mark.parametrize("class_token", ["middle", "head", "double", None])
def test_class_token_rows_move_to_their_new_places(class_token):
    old, new = (3, 5), (4, 7)
    rng = np.random.default_rng(0)
    grid = rng.normal(size=(1, 15, 2)).astype(np.float32)
    names = {"middle": [7.0], "head": [7.0], "double": [7.0, 8.0], None: []}[class_token]
    tokens = [np.full((1, 1, 2), value, np.float32) for value in names]
    table = insert_tokens(grid, tokens, class_token_positions(class_token, 15))
    resized = np.asarray(resize_positions(table, old, new, class_token))
    positions = class_token_positions(class_token, 28)
    assert resized.shape == (1, 28 + len(names), 2)
    assert [resized[0, position, 0] for position in positions] == names
    patches = np.delete(resized, positions, axis=1).reshape(4, 7, 2)
    expected = np.einsum("yi,xj,ijc->yxc", bicubic_matrix(3, 4), bicubic_matrix(5, 7), grid.reshape(3, 5, 2))
    np.testing.assert_allclose(patches, expected, rtol=1e-5, atol=1e-5)


def test_places_of_class_tokens():
    assert class_token_positions("middle", 729) == (364,)
    assert class_token_positions("middle", 196) == (98,)
    assert class_token_positions("double", 9) == (0, 10)
    sequence = insert_tokens(np.arange(9.0).reshape(1, 9, 1), [np.full((1, 1, 1), -1.0)], (4,))
    assert sequence[0, :, 0].tolist() == [0, 1, 2, 3, -1, 4, 5, 6, 7, 8]
