"""Measures speed and memory of whole networks, and the share of the selective scan.

    python scripts/benchmark_model.py [--implementations native sequential associative] [--batch 1] [--sizes 224 1248]
                                      [--repeats 5] [--json FILE]

The first table has inference of Vim-tiny at stride 8 (224 pixels) and of the whole student (56 pixels, enlarged to
224), and a training step of the student by the paper's recipe (teacher, all loss terms, gradients, AdamW), for each
implementation of the scan. "scan" is the share of the time that is saved by replacing the scan with a few sums and
products. The second table has inference of Vim-tiny at growing image sizes, and of an attention network of the same
number of parameters. Memory is XLA's estimate: arguments, results and temporaries. Weights are random.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax
from benchmark_scan import available, positive
from flax import linen as nn
from ml_collections import ConfigDict

import kernels
from kernels.scan.api import IMPLEMENTATIONS
from vimd_jax.config import default_config
from vimd_jax.models import create_model
from vimd_jax.models.network import input_images
from vimd_jax.training.optimizer import create_optimizer
from vimd_jax.training.parallel import replicate, shard
from vimd_jax.training.roles import build_networks
from vimd_jax.training.steps import create_state, make_train_step

CLASSES = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names, usual = IMPLEMENTATIONS.names, dict.fromkeys([*IMPLEMENTATIONS.candidates(), "associative"])
    parser.add_argument("--implementations", nargs="*", default=list(usual), choices=names, metavar="NAME")
    parser.add_argument("--batch", type=positive, default=1, help="images; per device in training")
    parser.add_argument("--sizes", type=positive, nargs="*", default=[224, 384, 512, 768, 1024, 1248])
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--json", type=Path, help="also write everything here")
    arguments = parser.parse_args()
    implementations = available(arguments.implementations)
    rows = []
    print(f"{jax.devices()[0].device_kind}, batch {arguments.batch}")
    print(f"{'':<34}{'scan by':<12}{'ms':>9}{'images/s':>10}{'scan':>7}{'memory MB':>11}")
    for name, measure in NETWORKS.items():
        with mock.patch("vimd_jax.models.mamba.selective_scan", no_scan):
            without = measure(None, arguments.batch, arguments.repeats)
        for implementation in implementations:
            row = measure(implementation, arguments.batch, arguments.repeats)
            share = 1 - without["seconds"] / row["seconds"]
            row |= {"network": name, "implementation": implementation, "scan_share": share}
            print(f"{name:<34}{implementation:<12}{columns(row)}", flush=True)
            rows.append(row)
    for size in arguments.sizes:
        for name, network in networks_of_size(size).items():
            row = inference(network, size, arguments.batch, arguments.repeats)
            row |= {"network": name, "size": size}
            print(f"{f'{name}, {size} pixels':<46}{columns(row)}", flush=True)
            rows.append(row)
    if arguments.json:
        device = jax.devices()[0].device_kind
        arguments.json.write_text(json.dumps({"device": device, "batch": arguments.batch, "rows": rows}, indent=1))


def columns(row: dict) -> str:
    share = f"{row['scan_share']:>7.0%}" if "scan_share" in row else " " * 7
    return f"{1e3 * row['seconds']:>9.1f}{row['images'] / row['seconds']:>10.2f}{share}{row['memory'] / 1e6:>11.0f}"


# ------------------------------------------------------------------------------------------------------- measurements


def vim(implementation: str | None, batch: int, repeats: int, **options: Any) -> dict:
    """Inference of the classifier at the published size, or with other options."""
    with kernels.use(scan=implementation):
        return inference(create_model("vim_tiny_stride8", num_classes=CLASSES, **options), 224, batch, repeats)


def student(implementation: str | None, batch: int, repeats: int, **options: Any) -> dict:
    """Inference of the whole student, with these options of its classifier."""
    with kernels.use(scan=implementation):
        return inference(create_model("srvm_tiny", num_classes=CLASSES, **options), 56, batch, repeats)


def inference(model: nn.Module, size: int, batch: int, repeats: int) -> dict:
    """Median seconds and memory of one application to a batch of square images."""
    images = jnp.full((batch, size, size, 3), 0.5)
    variables = jax.jit(model.init)(jax.random.key(0), images)
    program = jax.jit(model.apply).lower(variables, images).compile()
    seconds = median_seconds(program, repeats, variables, images)
    return {"seconds": seconds, "memory": planned(program), "images": batch}


def training_step(implementation: str | None, batch: int, repeats: int, **options: Any) -> dict:
    """Median seconds and memory of one training step on all local devices, with these options of both classifiers."""
    config = default_config("student")
    for section in (config.teacher, config.student):
        section.update(options)
    with kernels.use(scan=implementation):
        step, state, frozen, images = student_step(config, batch)
        program = step.lower(state, frozen, images).compile()
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        state, metrics = jax.block_until_ready(program(state, frozen, images))
        seconds.append(time.perf_counter() - began)
    count = batch * jax.local_device_count()
    return {"seconds": statistics.median(seconds[1:]), "memory": planned(program), "images": count}


def student_step(config: ConfigDict, batch: int) -> tuple:
    """A student's training step as in train.py, and its arguments: state, frozen networks, a batch per device."""
    networks = build_networks(config, [str(i) for i in range(CLASSES)])
    count = batch * jax.local_device_count()
    images = {name: jnp.zeros((count, size, size, 3), jnp.uint8) for name, size in (("high", 224), ("low", 56))}
    images |= {"target": jnp.zeros(count, jnp.int32), "weight": jnp.ones(count)}

    def initial(model: nn.Module) -> dict:
        return jax.jit(model.init)(jax.random.key(0), jnp.zeros(input_images(model).shape))

    frozen = {role: initial(model) for role, model in networks.frozen.items()}
    variables = initial(networks.trained)
    optimizer = create_optimizer(config.optimizer, variables["params"], optax.constant_schedule(1e-5))
    state = create_state(config, variables, optimizer)
    return make_train_step(config, networks, optimizer), replicate(state), replicate(frozen), shard(images)


def no_scan(u, delta, A, B, C, D, z, delta_bias, **options) -> jax.Array:
    """Replaces the scan: reads the same arrays, so that the operations that compute them stay in the program."""
    return ((D * u + delta + delta_bias + jnp.sum(B * C, -1, keepdims=True) + A.sum(1)) * z).astype(u.dtype)


NETWORKS = {"Vim-tiny stride 8": vim, "student": student, "student, training step": training_step}


def networks_of_size(size: int) -> dict[str, nn.Module]:
    """Two classifiers of about 7 million parameters for square images of this size."""
    return {"Vim-tiny": create_model("vim_tiny", image_size=size), "attention": Attention()}


class Attention(nn.Module):
    """A plain vision transformer (Dosovitskiy et al., 2021) of Vim-tiny's width and number of parameters."""

    num_classes: int = 1000
    embed_dim: int = 192
    depth: int = 15
    heads: int = 3

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Class scores of images (batch, height, width, 3)."""
        x = nn.Conv(self.embed_dim, (16, 16), strides=16)(images)
        x = x.reshape(len(x), -1, self.embed_dim)
        x += self.param("positions", nn.initializers.normal(0.02), x.shape[1:])
        for _ in range(self.depth):
            x += nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x))
            hidden = nn.gelu(nn.Dense(4 * self.embed_dim)(nn.LayerNorm()(x)))
            x += nn.Dense(self.embed_dim)(hidden)
        return nn.Dense(self.num_classes)(nn.LayerNorm()(x).mean(1))


def median_seconds(function: Callable, repeats: int, *arguments: Any) -> float:
    """Median seconds of `repeats` calls, after a warm-up call."""
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def planned(program: jax.stages.Compiled) -> int:
    """Bytes of a program's arguments, results and temporaries; donated arguments are counted once."""
    memory = program.memory_analysis()
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return used - memory.alias_size_in_bytes


if __name__ == "__main__":
    main()
