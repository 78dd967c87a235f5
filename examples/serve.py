"""Labels images over HTTP, in batches of those that arrive together; needs pip install "vimd-jax[serve]".

    python examples/serve.py --checkpoint workdir/student
    curl --data-binary @bird.jpg http://127.0.0.1:8000/

answers {"labels": [{"class": "Indigo Bunting", "probability": 0.93}, …]}, the most probable first. GET /health answers
as soon as the network is compiled. For the open internet, put a proxy in front that limits rates and speaks TLS.
"""

import argparse
import asyncio
import contextlib
from collections.abc import AsyncIterator

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from vimd_jax import load_model
from vimd_jax.checkpoints.trained_model import TrainedModel

MOST_BYTES = 32 * 2**20  # of an image
MOST_WAITING = 1024  # requests; further ones are refused


class Batches:
    """Batches requests: those that arrive while one batch is computed form the next."""

    def __init__(self, classifier: TrainedModel, batch_size: int):
        self.classifier, self.batch_size = classifier, batch_size
        self.waiting: asyncio.Queue = asyncio.Queue(MOST_WAITING)

    async def probabilities(self, image: np.ndarray) -> np.ndarray:
        """Class probabilities of one image, (classes,)."""
        answer = asyncio.get_running_loop().create_future()
        try:
            self.waiting.put_nowait((image, answer))
        except asyncio.QueueFull:
            raise HTTPException(503, "too many requests, try again later") from None
        return await answer

    async def run(self) -> None:
        """Answers requests until it is cancelled."""
        while True:
            batch = [await self.waiting.get()]
            while len(batch) < self.batch_size and not self.waiting.empty():
                batch.append(self.waiting.get_nowait())
            images, answers = zip(*batch)
            try:
                results = await asyncio.to_thread(self.classifier.probabilities, np.stack(images))
            except Exception as error:
                results = [error] * len(answers)
            for answer, result in zip(answers, results):
                if answer.done():  # the client has gone
                    continue
                if isinstance(result, Exception):
                    answer.set_exception(result)
                else:
                    answer.set_result(result)


def create_app(classifier: TrainedModel, batch_size: int = 32, top: int = 5) -> Starlette:
    """Creates the application, which compiles the network before it answers."""
    batches = Batches(classifier, batch_size)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await asyncio.to_thread(classifier.warm_up, [2**k for k in range(batch_size.bit_length())])
        worker = asyncio.create_task(batches.run())
        yield
        worker.cancel()

    async def label(request: Request) -> JSONResponse:
        content = bytearray()
        async for chunk in request.stream():
            content += chunk
            if len(content) > MOST_BYTES:
                raise HTTPException(413, f"an image may have at most {MOST_BYTES} bytes")
        try:
            image = await asyncio.to_thread(classifier.prepare, bytes(content), downsample=True)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        probabilities = await batches.probabilities(image)
        best = np.argsort(-probabilities)[:top]
        labels = [{"class": classifier.class_names[i], "probability": float(probabilities[i])} for i in best]
        return JSONResponse({"labels": labels})

    async def health(_: Request) -> JSONResponse:
        return JSONResponse({"classes": len(classifier.class_names)})

    async def refuse(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": error.detail}, error.status_code)

    routes = [Route("/", label, methods=["POST"]), Route("/health", health)]
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: refuse})


def main(arguments: list[str] | None = None) -> None:
    """Serves until asked to stop."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="a workdir, or a converted checkpoint")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 in a container")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--batch_size", type=int, default=32, help="most images at a time (default 32)")
    options = parser.parse_args(arguments)
    classifier = load_model(options.checkpoint)
    if not classifier.class_names:
        parser.error(f"{options.checkpoint} holds a network that does not classify: name a classifier")
    uvicorn.run(create_app(classifier, options.batch_size), host=options.host, port=options.port)


if __name__ == "__main__":
    main()
