"""The server of examples/: 200 requests at once on a port of its own, each answered like `predict` answers it."""

import concurrent.futures
import io
import json
import socket
import threading
import time
import urllib.error
import urllib.request

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vimd_jax.checkpoints.trained_model import TrainedModel
from vimd_jax.models import create_model

pytest.importorskip("starlette")
uvicorn = pytest.importorskip("uvicorn")
serve = pytest.importorskip("examples.serve")

NAMES = ("finch", "tern", "wren")


@pytest.fixture(scope="module")
def classifier() -> TrainedModel:
    model = create_model("vim_tiny", num_classes=3, image_size=32, embed_dim=16, depth=1)
    return TrainedModel(model, model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3))), NAMES)


@pytest.fixture(scope="module")
def address(classifier):
    """Of a server that runs until the tests are done."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(serve.create_app(classifier, batch_size=8), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + 60
        while not server.started and thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert server.started
        yield "http://{}:{}".format(*listener.getsockname())
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def post(address: str, content: bytes) -> dict:
    with urllib.request.urlopen(urllib.request.Request(address, content), timeout=60) as response:
        return json.load(response)


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(256, size=(32, 40, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def test_200_requests_at_once(address, classifier, monkeypatch):
    sizes, original = [], TrainedModel.probabilities

    def counted(self, images):
        sizes.append(len(images))
        return original(self, images)

    monkeypatch.setattr(TrainedModel, "probabilities", counted)
    images = [png(seed) for seed in range(200)]
    with concurrent.futures.ThreadPoolExecutor(200) as clients:
        answers = list(clients.map(lambda image: post(address, image), images))
    assert sum(sizes) == 200 and max(sizes) <= 8 and len(sizes) < 200
    expected = classifier.predict(images, batch_size=8)
    found = [{label["class"]: label["probability"] for label in answer["labels"]} for answer in answers]
    np.testing.assert_allclose([[labels[name] for name in NAMES] for labels in found], expected, atol=1e-5)


def test_what_is_no_image_is_refused_and_the_server_goes_on(address):
    with pytest.raises(urllib.error.HTTPError) as refusal:
        post(address, b"not an image")
    assert refusal.value.code == 400 and "not an image" in json.load(refusal.value)["error"]
    assert post(address, png(0))["labels"]
    with urllib.request.urlopen(f"{address}/health", timeout=60) as response:
        assert json.load(response) == {"classes": 3}
