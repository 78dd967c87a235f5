import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vimd_jax.checkpoints.format import save_model
from vimd_jax.checkpoints.trained_model import TrainedModel
from vimd_jax.models import create_model
from vimd_jax.training.classes import in_order


def test_data_that_number_their_classes(tmp_path):
    """Numbers from 0 are those of the outputs, in whatever order the folders sort; other numbers are other classes."""
    names = tuple(f"bird {i}" for i in range(11))
    model = create_model("vim_tiny", num_classes=11, image_size=16, patch_size=8, stride=8, embed_dim=8, depth=1)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    save_model(tmp_path, TrainedModel(model, variables, names))
    numbers = sorted(str(i) for i in range(11))  # 0, 1, 10, 2, …
    kernel = variables["params"]["head"]["kernel"]
    found = in_order(variables, tmp_path, numbers)["params"]["head"]["kernel"]
    np.testing.assert_array_equal(found, kernel[:, [int(number) for number in numbers]])
    with pytest.raises(ValueError, match="is for other classes than the data"):
        in_order(variables, tmp_path, [str(i) for i in range(1, 12)])
