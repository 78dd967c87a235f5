"""Exported programs give the network's own answers, for any number of images, with nothing of this library at hand."""

import json
import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from vimd_jax import export
from vimd_jax.checkpoints.format import save_model
from vimd_jax.checkpoints.trained_model import TrainedModel
from vimd_jax.models import create_model
from vimd_jax.models.network import input_images

SMALL = {"embed_dim": 16, "depth": 2, "image_size": 32, "patch_size": 8, "stride": 8, "num_classes": 3}
STUDENT = {"classifier": "vim_tiny", "sr_channels": 4, "sr_num_blocks": 1, **SMALL}
STAGES = {"dims": (8, 16), "depths": (1, 1), "num_classes": 3, "image_size": 32}
NETWORKS = {  # of every family
    "vim_tiny": SMALL,
    "local_vim_tiny": SMALL,
    "v2m_tiny": SMALL,
    "vmamba_tiny": STAGES,
    "vmamba2_tiny": STAGES,
    "local_vmamba_tiny": STAGES,
    "efficient_vmamba_tiny": STAGES | {"dims": (8, 8, 8, 8), "depths": (1, 1, 1, 1)},
    "srvm_tiny": STUDENT,
    "upernet_vim_tiny": SMALL | {"depth": 4, "head_channels": 8, "auxiliary_channels": 8},
    "upernet_v2m_tiny": SMALL | {"depth": 4, "head_channels": 8, "auxiliary_channels": 8},
    "srresnet_x2": {"channels": 4, "num_blocks": 1},
    "srresnet_x4": {"channels": 4, "num_blocks": 1},
}

RELOAD = """
import sys
from jax import export
import numpy as np
program = export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
np.save(sys.argv[3], program.call(np.load(sys.argv[2])))
print(*program.platforms)
print(*{name.split(".")[0] for name in sys.modules})
"""


def trained(name: str) -> TrainedModel:
    model = create_model(name, **NETWORKS[name])
    images = input_images(model)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros(images.shape))
    names = tuple(f"class {i}" for i in range(model.num_classes))
    low = 8 if name.startswith("srvm") else 0
    return TrainedModel(model, jax.tree.map(np.asarray, variables), names, low, 0.875, {"stage": "student"})


def images_for(network: TrainedModel, count: int) -> np.ndarray:
    size = input_images(network.model).shape[1:]
    return np.random.default_rng(0).random((count, *size), np.float32)


def answers(network: TrainedModel, images: np.ndarray) -> np.ndarray:
    if network.model.dense:
        return np.asarray(jax.nn.softmax(network.model.segment(network.variables, images)))
    if network.class_names:
        return network.probabilities(images)
    return np.asarray(network.model.apply(network.variables, images))


def operators(model: bytes) -> set[str]:
    import onnx
    from onnx_ir import from_proto

    return {node.op_type for node in from_proto(onnx.load_from_string(model)).graph.all_nodes()}


@pytest.mark.parametrize("name", NETWORKS)
def test_stablehlo_gives_the_same(name):
    network = trained(name)
    program, images = jax.export.deserialize(bytearray(export.to_stablehlo(network))), images_for(network, 3)
    np.testing.assert_allclose(program.call(images), answers(network, images), atol=1e-5)


def test_stablehlo_needs_only_jax(tmp_path):
    network, file = trained("srvm_tiny"), tmp_path / "net.stablehlo"
    file.write_bytes(export.to_stablehlo(network))
    images = images_for(network, 3)
    np.save(tmp_path / "images.npy", images)
    command = [sys.executable, "-c", RELOAD, file.name, "images.npy", "answers.npy"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    platforms, modules = result.stdout.splitlines()
    assert platforms == "cpu cuda tpu"
    assert "jax" in modules.split() and not {"vimd_jax", "kernels", "flax"} & set(modules.split())
    np.testing.assert_allclose(np.load(tmp_path / "answers.npy"), answers(network, images), atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_runtime_gives_the_same(name):
    pytest.importorskip("jax2onnx")
    runtime, network = pytest.importorskip("onnxruntime"), trained(name)
    content = export.to_onnx(network)
    assert "Loop" not in operators(content)  # which ONNX Runtime executes several times slower than Scan
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    description = export.describe_program(network)
    assert (taken.name, taken.shape) == (description["input"]["name"], description["input"]["shape"])
    assert given.name == description["output"]["name"]
    images = images_for(network, 3)
    for batch in (images[:1], images):
        (found,) = session.run(None, {"images": batch})
        np.testing.assert_allclose(found, answers(network, batch), atol=1e-5)
    if not network.class_names:
        other = np.random.default_rng(1).random((1, 9, 14, 3), np.float32)
        (found,) = session.run(None, {"images": other})
        np.testing.assert_allclose(found, answers(network, other), atol=1e-5)


@pytest.mark.parametrize(("weights", "tolerance"), [("bfloat16", 2**-8), ("int8", 1 / 127)])
def test_rounded_kernels_are_near_and_smaller(weights, tolerance):
    network = trained("vim_tiny")
    stored = jax.tree.map(lambda restore: restore(), export.stored(network.variables, weights))
    pairs = zip(flatten_dict(network.variables).items(), flatten_dict(stored).values())
    for (path, x), restored in pairs:
        assert restored.dtype == x.dtype
        bound = tolerance * np.abs(x).max() if path[-1].endswith("kernel") else 0
        assert np.abs(restored - x).max() <= bound
    assert len(export.to_stablehlo(network, weights)) < 0.9 * len(export.to_stablehlo(network))


def test_command(tmp_path, capsys):
    network = trained("srvm_tiny")
    save_model(tmp_path / "student", network)

    def run(*arguments) -> int:
        return export.main(["--checkpoint", f"{tmp_path}/student", *map(str, arguments)])

    output = tmp_path / "out" / "student.stablehlo"
    assert run("--format", "stablehlo", "--output", output, "--weights", "int8") == 0
    description = json.loads(output.with_suffix(".json").read_text())
    assert description["file"] == output.name and description["weights"] == "int8"
    assert description["input"]["shape"] == ["batch", 8, 8, 3] and description["output"]["shape"] == ["batch", 3]
    assert description["class_names"] == list(network.class_names)
    assert description["view"] == {"low_resolution": 8, "image_size": 32, "crop": 0.875}
    assert run("--output", tmp_path / "student.safetensors") == 0  # PyTorch's names, the default

    for arguments, message in [
        (("--format", "stablehlo", "--output", output), "exists"),
        (("--format", "stablehlo", "--output", tmp_path / "x.onnx"), "must end in .stablehlo"),
        (("--format", "onnx", "--output", tmp_path / "x.onnx", "--part", "sr"), "--part"),
        (("--output", tmp_path / "x.safetensors", "--weights", "int8"), "--weights"),
    ]:
        capsys.readouterr()
        assert run(*arguments) == 1
        assert message in capsys.readouterr().err


def test_onnx_without_its_extra_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(ValueError, match=r'pip install "vimd-jax\[onnx\]"'):
        export.to_onnx(trained("vim_tiny"))
