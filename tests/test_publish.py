"""Networks on the Hugging Face Hub: what was uploaded is read back."""

import json

import numpy as np
import pytest
from hub_server import COMMITS
from test_export import answers, images_for, trained

from vimd_jax import export, load_model
from vimd_jax.checkpoints.format import save_model
from vimd_jax.load import load_variables
from vimd_jax.publish import model_card, publish

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of httpx, about the Hub's client
NAME = "someone/birds"


def of_repository(hub) -> dict[str, bytes]:
    start = f"{NAME}/{COMMITS['main']}/"
    return {name.removeprefix(start): x for name, x in hub.files.items() if name.startswith(start)}


@pytest.mark.parametrize("name", ["srvm_tiny", "upernet_vim_tiny", "srresnet_x4"])
def test_what_is_pushed_is_read_back(name, hub, tmp_path, capsys):
    network = trained(name)
    checksum = save_model(tmp_path / "run" / "best", network)
    command = ["--checkpoint", str(tmp_path / "run"), "--push_to_hub", NAME, "--private"]
    assert export.main(command) == 0 and f"load_model('hf://{NAME}')" in capsys.readouterr().out
    assert hub.made == {NAME: True}
    variables = f"variables-{checksum[:16]}.safetensors"
    assert of_repository(hub).keys() == {"README.md", "network.json", variables}
    again = load_model(f"hf://{NAME}")
    assert (again.class_names, again.view if again.image_size else None, again.provenance) == (
        network.class_names,
        network.view if network.image_size else None,
        network.provenance,
    )
    images = images_for(network, 2)
    np.testing.assert_array_equal(answers(again, images), answers(network, images))
    load_variables(f"hf://{NAME}@main", network.model)


def test_an_exported_program_goes_with_it(hub, tmp_path):
    save_model(tmp_path / "net", trained("vim_tiny"))
    output = tmp_path / "net.stablehlo"
    command = ["--checkpoint", str(tmp_path / "net"), "--format", "stablehlo", "--output", str(output)]
    assert export.main([*command, "--push_to_hub", NAME]) == 0
    assert of_repository(hub)["net.stablehlo"] == output.read_bytes()
    assert json.loads(of_repository(hub)["net.json"])["file"] == "net.stablehlo"


def test_nothing_is_pushed_of_a_damaged_checkpoint(hub, tmp_path):
    save_model(tmp_path / "net", trained("vim_tiny"))
    (tmp_path / "net" / "network.json").write_text("{}")
    with pytest.raises(ValueError, match="damaged"):
        publish(tmp_path / "net", NAME)
    assert not hub.made


def test_without_an_output_only_a_push_makes_sense(hub, tmp_path, capsys):
    save_model(tmp_path / "net", trained("vim_tiny"))
    command = ["--checkpoint", str(tmp_path / "net")]
    for more in ([], ["--format", "onnx", "--push_to_hub", NAME]):
        assert export.main(command + more) == 1
        assert capsys.readouterr().err == "error: name the file to write (--output FILE)\n"
    assert not hub.made


def test_the_card_says_what_the_checkpoint_says():
    card = model_card(trained("srvm_tiny"), NAME)
    assert card.startswith("---\nlibrary_name: vimd_jax\npipeline_tag: image-classification\ntags:\n- srvm_tiny\n---\n")
    assert f'load_model("hf://{NAME}")' in card and 'predict("image.jpg", downsample=True)' in card
    assert "32×32 pixels (height × width), of which the central 0.875 is kept, reduced to 8×8" in card
    assert '["class 0", "class 1", "class 2"]' in card and '{"stage": "student"}' in card


def test_names_of_a_stranger_stay_text():
    """A class name can end no block of the card."""
    network = trained("vim_tiny")
    object.__setattr__(network, "class_names", ("```\n# Run this", "</script>", "a"))
    lines = model_card(network, NAME).splitlines()
    assert not any(line.startswith("# Run") for line in lines) and sum(line.startswith("```") for line in lines) == 6
