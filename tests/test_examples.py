"""The scripts of examples/ do what they say, in seconds."""

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from examples import flax_nnx, nearest_neighbours, sequence_model, training_loop
from vimd_jax.checkpoints.format import save_model
from vimd_jax.checkpoints.trained_model import TrainedModel
from vimd_jax.models import create_model


def test_the_training_loop_learns():
    assert training_loop.main() > 0.9


def test_the_scan_remembers():
    before, after = sequence_model.main()
    assert after < before / 4


def test_an_image_is_its_own_nearest_neighbour(tmp_path):
    model = create_model("vim_tiny", num_classes=2, image_size=32, embed_dim=16, depth=1)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    save_model(tmp_path / "net", TrainedModel(model, variables, ("a", "b")))
    (tmp_path / "images").mkdir()
    for seed in range(4):
        pixels = np.random.default_rng(seed).integers(256, size=(40, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{seed}.png")
    image = f"{tmp_path}/images/2.png"
    found = nearest_neighbours.main([image, f"{tmp_path}/images", "--checkpoint", f"{tmp_path}/net"])
    assert str(found[0][0]) == image and len(found) == 4
    np.testing.assert_allclose(found[0][1], 1, rtol=1e-5)


def test_a_network_is_an_nnx_module_too():
    model = flax_nnx.main()
    assert model(jnp.zeros((3, 32, 32, 3))).shape == (3, 10)
