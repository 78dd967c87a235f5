"""Compile time of a student training step and the memory of its activations, against depth.

    python scripts/benchmark_compile.py

The step is that of the paper's recipe: SRVM-Net and its teacher at the published size (56 to 224 pixels, stride 8), all
loss terms, gradients, AdamW. Only shapes are compiled, nothing runs. The memory is XLA's own plan (`memory_analysis`)
of the classifier's gradient; its growth per layer is given in states, (batch, tokens, embed_dim) float32.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from vimd_jax import losses
from vimd_jax.models import create_model
from vimd_jax.training.optimizer import create_optimizer

OPTIMIZER = ConfigDict(
    {"weight_decay": 0.05, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "clip_norm": None, "decay_state_matrix": True}
)


def student_step(depth: int, remat: bool) -> tuple:
    """The training step and the shapes of its arguments."""
    student = create_model("srvm_tiny", num_classes=200, depth=depth, remat=remat)
    teacher = create_model("vim_tiny_stride8", num_classes=200, depth=depth)
    low, high = (jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32) for size in (56, 224))
    variables = jax.eval_shape(student.init, jax.random.key(0), low)
    params = variables["params"]["classifier"]
    frozen = {
        "sr": variables["params"]["sr"],
        "batch_stats": variables["batch_stats"],
        "teacher": jax.eval_shape(teacher.init, jax.random.key(0), high),
    }
    optimizer = create_optimizer(OPTIMIZER, params, optax.constant_schedule(1e-4))

    def step(params, opt_state, frozen, low, high, labels):
        teacher_logits, teacher_features = teacher.apply(frozen["teacher"], high, return_features=True)

        def loss(params):
            trees = {"params": {"sr": frozen["sr"], "classifier": params}, "batch_stats": frozen["batch_stats"]}
            logits, features = student.apply(trees, low, train=True, return_features=True)
            states = features["hidden_states"], teacher_features["hidden_states"]
            return (
                losses.label_smoothing_cross_entropy(logits, labels, 0.1)
                + losses.logits_distillation(logits, teacher_logits, 4.0)
                + 20 * losses.hidden_state_distillation(*states, "all", normalize=True)
            )

        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    labels = jax.ShapeDtypeStruct((1,), jnp.int32)
    return step, (params, jax.eval_shape(optimizer.init, params), frozen, low, high, labels)


def classifier_memory(depth: int, remat: bool, batch: int) -> tuple[int, int]:
    """Bytes that the gradient of a Vim-tiny (stride 8) needs besides arguments and results, and bytes of one state."""
    model = create_model("vim_tiny_stride8", num_classes=200, depth=depth, remat=remat)
    images = jax.ShapeDtypeStruct((batch, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    gradient = jax.jit(jax.grad(lambda variables, images: model.apply(variables, images, train=True).sum()))
    memory = gradient.lower(variables, images).compile().memory_analysis()
    return memory.temp_size_in_bytes, batch * 730 * model.embed_dim * 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[24, 48], help="of the compiled training steps")
    parser.add_argument("--memory_depths", type=int, nargs="+", default=[6, 12, 24])
    parser.add_argument("--batch", type=int, default=4, help="of the memory table")
    args = parser.parse_args()

    print("| depth | remat | trace and lower (s) | compile (s) |\n|---|---|---|---|")
    for depth in args.depths:
        for remat in (False, True):
            step, shapes = student_step(depth, remat)
            start = time.perf_counter()
            lowered = jax.jit(step).lower(*shapes)
            middle = time.perf_counter()
            lowered.compile()
            end = time.perf_counter()
            print(f"| {depth} | {remat} | {middle - start:.1f} | {end - middle:.1f} |", flush=True)

    print("\n| depth | remat | temporary MB | growth per layer, in states |\n|---|---|---|---|")
    for remat in (False, True):
        previous = None
        for depth in args.memory_depths:
            bytes_, state = classifier_memory(depth, remat, args.batch)
            growth = "" if previous is None else f"{(bytes_ - previous[1]) / (depth - previous[0]) / state:.2f}"
            print(f"| {depth} | {remat} | {bytes_ / 1e6:.1f} | {growth} |", flush=True)
            previous = depth, bytes_


if __name__ == "__main__":
    main()
