"""Measures a training step of networks: cross-entropy, gradients, AdamW, on a batch of images of the network's size.

    python scripts/benchmark_training.py [NAME …] [--batch 8] [--repeats 5] [--json FILE]

"first" is the time until the first step is done, compilation included; "step" the least time of those that follow, and
"processor" the least time that they took of all cores together, which other work on the machine changes little;
"memory" what XLA plans for arguments, results and temporaries, and "resident" the largest size of the process so far.
Weights and images are random. `compare_commits.py` runs it in checkouts of commits that lack it.
"""

import argparse
import contextlib
import json
import resource
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from vimd_jax.models import create_model

NAMES = ("vim_tiny", "local_vim_tiny", "v2m_tiny", "vmamba_tiny", "local_vmamba_tiny", "efficient_vmamba_tiny")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=NAMES, metavar="NAME")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write everything here")
    arguments = parser.parse_args()
    with contextlib.suppress(ImportError):  # an earlier commit has no such function
        from vimd_jax.memory import use_large_pages

        use_large_pages()  # as the training program does
    rows = []
    print(f"{'':<28}{'first':>9}{'step':>10}{'processor':>11}{'memory':>10}{'resident':>10}")
    for name in arguments.names:
        row = {"network": name, "batch": arguments.batch} | measure(name, arguments.batch, arguments.repeats)
        rows.append(row)
        processor = row["processor"]["milliseconds"]
        print(
            f"{name:<28}{row['first']:>7.1f} s{1e3 * row['seconds']:>7.0f} ms{processor:>8.0f} ms"
            f"{row['memory']:>7.2f} GB{row['resident']:>7.2f} GB",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows}, indent=1))


def measure(name: str, batch: int, repeats: int) -> dict:
    """Seconds until the first step is done, seconds and processor time of later ones, memory in GB."""
    model = create_model(name)
    side = 56 if name.startswith("srvm") else 224
    images = jax.random.uniform(jax.random.key(1), (batch, side, side, 3))
    labels = jnp.arange(batch)
    optimizer = optax.adamw(1e-4)

    def step(state, images, labels):
        variables, moments = state

        def loss(params):
            logits, updated = model.apply(variables | {"params": params}, images, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updated

        (value, updated), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        updates, moments = optimizer.update(gradients, moments, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return (variables | {"params": params} | updated, moments), value

    variables = jax.jit(model.init)(jax.random.key(0), images[:1])
    state = variables, optimizer.init(variables["params"])
    began = time.perf_counter()
    program = jax.jit(step, donate_argnums=0).lower(state, images, labels).compile()
    with contextlib.suppress(ImportError):
        from vimd_jax.memory import give_back

        give_back()
    times, processor = [], []
    for _ in range(repeats + 1):
        used = time.process_time()
        state, _ = jax.block_until_ready(program(state, images, labels))
        times.append(time.perf_counter() - began)
        processor.append(time.process_time() - used)
        began = time.perf_counter()
    plan = program.memory_analysis()
    memory = (
        plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes - plan.alias_size_in_bytes
    )
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux
    return {
        "first": times[0],
        "seconds": min(times[1:]),
        "processor": {"milliseconds": 1e3 * min(processor[1:])},
        "memory": memory / 1e9,
        "resident": resident / 1e9,
    }


if __name__ == "__main__":
    main()
