"""The table of classifiers: its counts against known ones, and its format."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from scripts import model_table
from vimd_jax.models import CLASSIFIERS, create_model, list_models
from vimd_jax.models.network import Network


@functools.cache
def operations(name: str) -> model_table.Operations:
    return model_table.count_operations(create_model(name))


# Billions, counted on the original PyTorch classes or derived from their shapes. By VMamba's rule:
TOTALS = {
    "efficient_vmamba_tiny": 0.8064,
    "efficient_vmamba_small": 1.3426,
    "efficient_vmamba_base": 3.9967,
    "vmamba_tiny": 5.623,
    "vmamba_small": 11.227,
    "vmamba_base": 18.014,
    "vmamba2_tiny": 4.852,
    "vmamba2_tiny_s1l8": 4.900,
    "vmamba2_small": 8.710,
    "vmamba2_small_s1l20": 8.606,
    "vmamba2_base": 15.351,
    "vmamba2_base_s1l20": 15.213,
}
# The same without norms.
WITHOUT_NORMS = {
    "vim_tiny": 1.82,
    "vim_tiny_stride8": 6.75,
    "vim_small": 5.91,
    "vim_small_stride8": 21.9,
    "vim_base": 20.9,
    "v2m_tiny": 3.82,
    "v2m_small": 10.41,
    "local_vim_tiny": 2.14,
    "local_vim_small": 6.31,
    "local_vmamba_tiny": 3.699 + 1.934,
    "local_vmamba_small": 7.711 + 3.492,
}
# By LocalMamba's rule.
OF_LOCAL_MAMBA = {
    "vim_tiny": 1.48,
    "vim_tiny_stride8": 5.49,
    "vim_small": 5.14,
    "vim_small_stride8": 19.1,
    "vim_base": 19.0,
    "local_vim_tiny": 1.482,
    "local_vim_tiny_middle_token": 1.489,
    "local_vim_small": 4.771,
}
# Matrix products and convolutions alone.
PRODUCTS = {
    "vim_tiny": 1.293,
    "vim_tiny_stride8": 4.790,
    "vim_small": 4.851,
    "vim_base": 18.77,
    "v2m_tiny": 1.705,
    "v2m_small": 6.185,
    "local_vim_tiny": 1.260,
    "local_vim_small": 4.55,
    "local_vmamba_tiny": 3.699,
    "local_vmamba_small": 7.711,
}


@pytest.mark.parametrize("name", TOTALS)
def test_totals(name):
    assert operations(name).total / 1e9 == pytest.approx(TOTALS[name], rel=0.01)


@pytest.mark.parametrize("name", WITHOUT_NORMS)
def test_totals_without_norms(name):
    count = operations(name)._replace(normalized=0)
    assert count.total / 1e9 == pytest.approx(WITHOUT_NORMS[name], rel=0.01)


@pytest.mark.parametrize("name", OF_LOCAL_MAMBA)
def test_totals_by_the_rule_of_local_mamba(name):
    count = model_table.by_rule_of_local_mamba(create_model(name), operations(name))
    assert count / 1e9 == pytest.approx(OF_LOCAL_MAMBA[name], rel=0.01)


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name):
    assert operations(name).products / 1e9 == pytest.approx(PRODUCTS[name], rel=0.005)


@pytest.mark.parametrize("name", model_table.PUBLISHED)
def test_counts_are_near_the_published_ones(name):
    """Counts equal published ones, which have two or three digits, where a family's rule is known."""
    published, model = model_table.PUBLISHED[name], create_model(name)
    if published.operations is None or published.family == "V2M":
        return
    rule = model_table.RULES.get(type(model).__name__)
    count = rule(model, operations(name)) if rule else operations(name).total
    assert count / 1e9 == pytest.approx(published.operations, rel=0.02, abs=0.06)


class Parts(Network):
    """Contains everything that is counted: a strided convolution, grouped convolutions, layers in a loop, a norm."""

    image_size: int = 8

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 2), strides=2, padding="VALID")(x)  # (1, 3, 4, 6)
        x = nn.Conv(12, (3, 3), feature_group_count=3)(x)
        x = nn.RMSNorm()(x)
        layers = nn.scan(nn.remat(Doubled), variable_axes={"params": 0}, split_rngs={"params": True}, length=5)
        x, _ = layers()(x, None)
        return jax.jit(jnp.dot)(x.mean((1, 2)), jnp.ones((12, 7)))


class Doubled(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        shared = nn.Dense(12)
        return shared(shared(x)), None


def test_every_kind_of_operation():
    positions = 3 * 4
    products = positions * (6 * 3 * 2 * 3 + 12 * 3 * 3 * 2 + 5 * 2 * 12 * 12) + 12 * 7
    assert model_table.count_operations(Parts()) == (products, positions * 12, 0, 0)


def test_scans_and_short_convolutions():
    """Derives the count of a Vim of one layer, term by term."""
    model = create_model("vim_tiny", depth=1, embed_dim=32, image_size=48, state_size=4, num_classes=10)
    tokens, dim, channels, rank, state = 10, 32, 64, 2, 4
    matrices = 2 * channels * dim + channels * dim + 2 * (channels * (rank + 2 * state) + rank * channels)
    products = (tokens - 1) * dim * 3 * 16**2 + tokens * (matrices + 2 * 4 * channels) + dim * 10
    scans = 2 * tokens * channels
    count = model_table.count_operations(model)
    assert count == (products, 2 * tokens * dim, scans * state, 2 * scans)
    assert count.total == products + 10 * tokens * dim + 9 * scans * state + 2 * scans


def test_counting_leaves_the_networks_as_they_were():
    model = create_model("vim_tiny", depth=1, embed_dim=16, image_size=16)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    before, _, after = (
        str(jax.make_jaxpr(model.apply)(variables, jnp.zeros((1, 16, 16, 3)))),
        model_table.count_operations(model),
        str(jax.make_jaxpr(model.apply)(variables, jnp.zeros((1, 16, 16, 3)))),
    )
    assert "tally" not in before + after
    assert before.count("\n") == after.count("\n")


def test_rows():
    lines = model_table.table(["vim_tiny*"]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:4]]
    assert {len(line) for line in cells} == {len(model_table.COLUMNS)}
    checkpoint = "[vim_t_midclstok_76p1acc.pth](https://huggingface.co/hustvl/Vim-tiny-midclstok)"
    vim = "[Vim](https://arxiv.org/abs/2401.09417)"
    assert cells[2] == ["`vim_tiny`", vim, "7,148,008", "224×224", "1.83", "1.48", "1.5", "76.1", checkpoint]
    assert lines[-1].startswith("- Vim: ")


def test_every_classifier_has_a_row():
    assert set(model_table.listed(["*"])) == {name for name in CLASSIFIERS if not name.endswith("_search")}
    assert set(model_table.PUBLISHED) <= set(list_models())
    assert {published.family for published in model_table.PUBLISHED.values()} == set(model_table.FAMILIES)


def test_unpublished_networks_have_a_row_too(monkeypatch):
    without = {name: published for name, published in model_table.PUBLISHED.items() if name != "vim_tiny"}
    monkeypatch.setattr(model_table, "PUBLISHED", without)
    cells = model_table.table(["vim_tiny"]).splitlines()[2].split(" | ")
    assert cells[0] == "| `vim_tiny`" and cells[2] == "7,148,008"
    assert cells[1] == cells[6] == cells[7] == "–"


def test_command(tmp_path, monkeypatch, capsys):
    file = tmp_path / "networks.md"
    file.write_text(f"before\n{model_table.BEGIN}old{model_table.END}\nafter\n")
    monkeypatch.setattr("sys.argv", ["model_table.py", "vim_tiny", "--into", str(file)])
    model_table.main()
    table = model_table.table(["vim_tiny"])
    assert file.read_text() == f"before\n{model_table.BEGIN}\n{table}{model_table.END}\nafter\n"
    monkeypatch.setattr("sys.argv", ["model_table.py", "resnet*"])
    with pytest.raises(SystemExit):
        model_table.main()
    assert "no classifier matches resnet*; there are vim_tiny, " in capsys.readouterr().err


def test_the_docs_have_the_table():
    page = (Path(model_table.__file__).parent.parent / "docs" / "networks.md").read_text()
    table = page.partition(model_table.BEGIN)[2].partition(model_table.END)[0]
    assert table.strip() == model_table.table(["*"]).strip()
