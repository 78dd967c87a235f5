"""Networks by name: parameter counts, options, and errors for misspelt ones."""

import json
import math

import golden
import jax
import jax.numpy as jnp
import pytest

from vimd_jax.models import create_model, describe, list_models
from vimd_jax.models.local_vim import UNSEARCHED
from vimd_jax.models.published import PUBLISHED

# Their parameters are counted where their tensors are compared, in tests/weight_convert.
PUBLISHED_SEGMENTERS = set(json.loads((golden.FOLDER / "segmenter_keys.json").read_text())["variants"])

# Counted on the original PyTorch classes at full size (1,000 classes unless stated).
PARAMETERS = [
    ("vim_tiny", {}, 7_148_008),
    ("vim_tiny_stride8", {}, 7_250_344),
    ("vim_small", {}, 25_796_584),
    ("vim_small_stride8", {}, 26_001_256),
    ("vim_base", {}, 97_598_440),
    ("vim_tiny", {"num_classes": 200}, 6_993_608),
    *[
        ("vim_tiny_stride8", {"num_classes": classes}, count)
        for classes, count in {
            200: 7_095_944,  # CUB
            196: 7_095_172,  # Cars
            120: 7_080_504,  # Dogs
            102: 7_077_030,  # Flowers
            100: 7_076_644,  # Aircraft
            67: 7_070_275,  # MIT67
            40: 7_065_064,  # Stanford 40 Actions
            37: 7_064_485,  # Pets
        }.items()
    ],
    ("local_vim_tiny", {}, 7_994_152),
    ("local_vim_tiny", {"directions": UNSEARCHED}, 7_994_152),
    ("local_vim_tiny_middle_token", {}, 7_994_536),
    ("local_vim_small", {}, 27_783_784),
    ("local_vim_search", {}, 5_473_288),
    ("local_vmamba_tiny", {}, 25_527_160),
    ("local_vmamba_small", {}, 49_748_536),
    ("local_vmamba_search", {}, 4_576_656),
    ("local_vmamba_search", {"depths": (2, 2, 27, 2)}, 9_148_512),
    ("vmamba_tiny", {}, 22_893_448),
    ("vmamba_small", {}, 44_417_416),
    ("vmamba_base", {}, 76_254_056),
    ("vmamba2_tiny", {}, 30_705_832),
    ("vmamba2_tiny_s1l8", {}, 30_249_064),
    ("vmamba2_small", {}, 50_147_752),
    ("vmamba2_small_s1l20", {}, 49_012_840),
    ("vmamba2_base", {}, 88_557_800),
    ("vmamba2_base_s1l20", {}, 86_614_504),
    ("efficient_vmamba_tiny", {}, 6_493_660),
    ("efficient_vmamba_small", {}, 11_273_688),
    ("efficient_vmamba_small", {"dims": 96}, 24_757_456),  # published settings, unlike the training log
    ("efficient_vmamba_base", {}, 33_717_136),
    ("v2m_tiny", {}, 6_852_712),
    ("v2m_tiny", {"depth": 12}, 3_615_592),
    ("v2m_small", {}, 25_205_992),
    ("srresnet_x2", {}, 1_399_637),
    ("srresnet_x4", {}, 1_547_350),
    ("srresnet_x8", {}, 1_695_063),
    ("srvm_tiny", {"num_classes": 200}, 8_643_294),
    # Not published; counted here.
    ("upernet_v2m_tiny", {}, 12_016_364),
    ("upernet_v2m_small", {}, 44_858_540),
    ("upernet_vmamba2_small_s1l20", {}, 80_666_348),
    ("upernet_vmamba2_base_s1l20", {}, 120_125_996),
]


def test_published_parameters_are_those_of_the_originals():
    originals = {name: count for name, overrides, count in PARAMETERS if not overrides and name in PUBLISHED}
    assert originals == {name: PUBLISHED[name].parameters for name in originals}


@pytest.mark.parametrize(("name", "overrides", "count"), PARAMETERS)
def test_parameter_counts(name, overrides, count):
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(create_model(name, **overrides).init, jax.random.key(0), images)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"])) == count


def test_list_models():
    assert {name for name, *_ in PARAMETERS} | PUBLISHED_SEGMENTERS == set(list_models())
    assert list_models("vim_tiny*") == ["vim_tiny", "vim_tiny_stride8"]
    assert list_models("nothing") == []


def test_overrides_reach_the_module():
    model = create_model("vim_tiny_stride8", num_classes=3, image_size=(64, 48), class_token=None, pool="max")
    assert (model.num_classes, model.stride, model.grid, model.pool) == (3, 8, (7, 5), "max")
    student = create_model("srvm_tiny", depth=2, sr_channels=8, scale=2)
    assert (student.classifier.depth, student.classifier.stride, student.sr.channels, student.sr.scale) == (2, 8, 8, 2)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("vim_tinny", {}, "^name: .*'vim_tinny'.*vim_tiny"),
        ("resnet", {}, "^name: .*srresnet_x4"),
        ("vim_tiny", {"num_class": 3}, "^num_class: vim_tiny .*num_classes"),
        ("vim_tiny", {"sr_channels": 3}, "^sr_channels: vim_tiny"),
        ("srresnet_x4", {"depth": 3}, "^depth: srresnet_x4 .*num_blocks"),
        ("srvm_tiny", {"classifier_depth": 3}, "^classifier_depth: srvm_tiny .*sr_num_blocks"),
        ("vim_tiny", {"depth": 2.5}, "^depth: 2.5 is not valid, expected int$"),
        ("vim_tiny", {"depth": True}, "^depth: True is not valid, expected int$"),
        ("vim_tiny", {"remat": "maybe"}, "^remat: 'maybe' is not valid, expected bool$"),
        ("vim_tiny", {"image_size": (224, 7.5)}, "^image_size: .* expected int or tuple"),
        ("vim_tiny", {"merge": None}, "^merge: None is not valid, expected 'mean' or 'sum'$"),
        ("vim_tiny", {"dtype": "fast"}, "^dtype: 'fast' is not supported, expected float32 or bfloat16"),
        ("vim_tiny", {"dtype": "float16"}, "^dtype: 'float16' is not supported"),
        ("srvm_tiny", {"sr_channels": "8"}, "^channels: '8' is not valid, expected int$"),
        (
            "srvm_tiny",
            {"classifier": "vim_huge"},
            "^classifier: 'vim_huge' is not a classifier, choose one of vim_tiny",
        ),
        ("srvm_tiny", {"classifier": "srresnet_x4"}, "^classifier: 'srresnet_x4' is not a classifier"),
        ("srvm_tiny", {"classifier": "srvm_tiny"}, "^classifier: 'srvm_tiny' is not a classifier"),
        ("srresnet_x4", {"num_blocks": 0}, "^num_blocks: 0 is not valid, expected at least 1"),
    ],
)
def test_bad_names_and_values_are_explained(name, overrides, message):
    with pytest.raises(ValueError, match=message) as error:
        create_model(name, **overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", list_models())
def test_a_description_makes_the_same_network(name):
    model = create_model(name)
    description = json.loads(json.dumps(describe(model)))
    assert description["architecture"] == name
    assert create_model(name, **description["options"]) == model


def test_a_description_holds_what_decides_a_number_and_nothing_else():
    student = create_model("srvm_tiny", sr="bicubic", merge="sum", image_size=(64, 48), remat=True, dtype="bfloat16")
    options = describe(student)["options"]
    assert (options["sr"], options["merge"], options["image_size"]) == ("bicubic", "sum", (64, 48))
    assert options["classifier"] == "vim_tiny_stride8"
    assert not {"remat", "dtype"} & set(options)
