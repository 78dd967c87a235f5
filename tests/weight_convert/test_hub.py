"""Weights by name, from a server on this machine that speaks the Hub's protocol."""

import os
import subprocess
import sys

import pytest
from hub_server import COMMITS, point_at

from vimd_jax.errors import CheckpointError
from vimd_jax.models import MODELS
from vimd_jax.models.published import FAMILIES, PUBLISHED, page
from weight_convert.hub import architecture_of, is_name, push, resolve

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of httpx, about the Hub's client
constants = pytest.importorskip("huggingface_hub.constants")

VIM = PUBLISHED["vim_tiny_stride8"].file


@pytest.fixture
def hub(hub):
    """The server with a few files."""
    hub.files |= {
        f"hustvl/Vim-tiny-midclstok/{COMMITS['main']}/vim_t_midclstok_ft_78p3acc.pth": b"the newest",
        f"hustvl/Vim-tiny-midclstok/{COMMITS['v1']}/vim_t_midclstok_ft_78p3acc.pth": b"the first",
        f"someone/nested/{COMMITS['main']}/folder/model.safetensors": b"nested",
    }
    return hub


def refused(name, message, **arguments):
    with pytest.raises(CheckpointError, match=message) as caught:
        resolve(name, **arguments)
    assert "\n" not in str(caught.value)


def test_file_of_the_hub_is_downloaded_once(hub):
    path = resolve(VIM)
    assert path.read_bytes() == b"the newest" and path.name == "vim_t_midclstok_ft_78p3acc.pth"
    gets = len(hub.requests)
    assert resolve(VIM) == path and len(hub.requests) == gets + 1  # asks for the version only


def test_revision(hub):
    assert resolve(f"{VIM}@v1").read_bytes() == b"the first"
    assert resolve(f"{VIM}@{COMMITS['v1']}").read_bytes() == b"the first"


def test_file_in_a_folder_of_the_repository(hub):
    assert resolve("hf://someone/nested/folder/model.safetensors").read_bytes() == b"nested"


def test_pretrained_is_the_published_file_of_the_architecture(hub):
    assert resolve("pretrained:vim_tiny_stride8") == resolve(VIM) == resolve("pretrained", "vim_tiny_stride8")
    assert architecture_of("pretrained:vim_tiny_stride8") == "vim_tiny_stride8"
    assert architecture_of("pretrained") is None and architecture_of(VIM) is None


def test_cached_file_needs_no_network(hub, monkeypatch):
    path = resolve(VIM)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert resolve(VIM) == path and len(hub.requests) == asked
    by_hand = "or download vim_t_midclstok_ft_78p3acc.pth from https://huggingface.co/hustvl/Vim-tiny-midclstok"
    refused(f"{VIM}@v1", f"not in the cache, and HF_HUB_OFFLINE is set; unset it, {by_hand}")


def test_without_network(hub, monkeypatch):
    path = resolve(VIM)
    point_at(monkeypatch, "http://127.0.0.1:9")
    assert resolve(VIM) == path
    refused("pretrained:vim_tiny", r"the Hub cannot be reached; .* \(about 109.7 MiB\) and name its path")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf://nobody/nothing/model.pth", "no public repository nobody/nothing"),
        ("hf://someone/gated/model.pth", "access to someone/gated is restricted"),
        (f"{VIM}@v9", "has no revision 'v9'"),
        ("hf://someone/nested/model.pth", "someone/nested has no file 'model.pth'"),
        ("hf://someone/nested/model.pth@v1", "has no file 'model.pth' in revision 'v1'"),
        ("hf://someone/nested/../../../etc/passwd", "cannot be downloaded|has no file"),
        ("hf://someone/nested", "no file 'network.json'; name one that it has: hf://someone/nested/FILE"),
    ],
)
def test_what_the_hub_does_not_have(hub, name, message):
    refused(name, message)


def test_environment_of_the_hub_is_heeded(hub, tmp_path):
    """HF_ENDPOINT and HF_HOME, which the Hub's client reads when it is imported."""
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path / "home"),
    }
    code = f"from weight_convert.hub import resolve; print(resolve({VIM!r}))"
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout.startswith(str(tmp_path / "home" / "hub"))


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(
        VIM, r"not installed; run: pip install 'vimd-jax\[hub\]', or download .* from https://huggingface.co/hustvl"
    )


@pytest.mark.parametrize("name", ["hf://", "hf://file.pth", "hf://a/b/", "hf://a b/c/d", "hf://a/b/c@"])
def test_malformed_name(name):
    refused(name, "not of the form hf://owner/repository")


def test_release_file_is_saved_by_hand(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    place = tmp_path / "vimd_jax" / "weights" / "vssmtiny_dp01_ckpt_epoch_292.pth"
    address = "https://github.com/MzeroMiko/VMamba/releases/download/%23v0cls/vssmtiny_dp01_ckpt_epoch_292.pth"
    size = r"\(of unknown size, of which the weights as float32 are 87 MiB\)"
    refused("pretrained:vmamba_tiny", f"^{address} is downloaded by hand: save it {size} as {place}, or elsewhere")
    refused(address, f"^{address} is downloaded by hand: save it as {place}, or elsewhere")
    place.parent.mkdir(parents=True)
    place.write_bytes(b"weights")
    assert resolve("pretrained:vmamba_tiny") == resolve(address) == place


@pytest.mark.parametrize("name", ["pretrained:v2m_tiny", "pretrained:vim_tinny"])
def test_architecture_without_weights(name):
    refused(name, r"no weights are published for '\w+'; there are weights for vim_tiny, ")
    with pytest.raises(CheckpointError):
        architecture_of(name)


def test_pretrained_of_nothing():
    refused("pretrained", "needs an architecture")


def test_paths_stay_paths(tmp_path):
    for path in (tmp_path / "a.pth", "weights/pretrained", "C:\\a.pth", "pretrained.pth"):
        assert not is_name(path) and str(resolve(path)) == str(path)


def test_the_published_table():
    for name, published in PUBLISHED.items():
        assert name in MODELS and published.family in FAMILIES
        assert not published.file or is_name(published.file)
    assert page(VIM) == "https://huggingface.co/hustvl/Vim-tiny-midclstok"
    release = "https://github.com/hunto/LocalMamba/releases/tag/v1.0.0"
    assert page(PUBLISHED["local_vim_tiny"].file) == release


def not_pushed(message, repository="someone/new"):
    with pytest.raises(CheckpointError, match=message) as caught:
        push(repository, {"a.txt": b"a"})
    assert "\n" not in str(caught.value)


def test_push_makes_a_repository(hub, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"large")
    page = push("someone/new", {"README.md": b"small", "x.safetensors": tmp_path / "x.safetensors"}, private=True)
    assert page == f"http://127.0.0.1:{hub.server_port}/someone/new"
    assert hub.made == {"someone/new": True}
    assert resolve("hf://someone/new/README.md").read_bytes() == b"small"
    assert resolve("hf://someone/new/x.safetensors").read_bytes() == b"large"


def test_push_replaces_the_network_that_was_there(hub):
    push("someone/new", {"variables-1.safetensors": b"1", "notes.txt": b"notes"})
    push("someone/new", {"variables-2.safetensors": b"2"})
    names = {name.rpartition("/")[2] for name in hub.files if name.startswith("someone/new/")}
    assert names == {"variables-2.safetensors", "notes.txt"}


def test_push_needs_a_token(hub, monkeypatch):
    not_pushed("the token may not write there", repository="someone/gated")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    not_pushed("the token is not valid; run: hf auth login")
    monkeypatch.delenv("HF_TOKEN")
    not_pushed("uploading needs a token; run: hf auth login, or set HF_TOKEN")
    assert not hub.made


def test_push_without_network_or_with_a_wrong_name(hub, monkeypatch):
    not_pushed("cannot be uploaded .*; check the name", repository="someone/new/file")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    not_pushed("nothing can be uploaded while HF_HUB_OFFLINE is set")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    point_at(monkeypatch, "http://127.0.0.1:9")
    not_pushed("cannot be uploaded .*; check the name, or try again")


def test_push_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    not_pushed(r"not installed; run: pip install 'vimd-jax\[hub\]'")
