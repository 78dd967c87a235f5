"""Measures the compile time of a student's training step against its depth, and the memory that it needs.

    python scripts/benchmark_compile.py

The step is that of the paper's recipe: SRVM-Net and its teacher at the published size (56 to 224 pixels, stride 8), all
loss terms, gradients, AdamW. It is compiled but not run. Memory is XLA's estimate (`memory_analysis`) for the whole
step and for the classifier's gradient; for the latter, growth per layer is given in states, (batch, tokens, embed_dim)
float32.
"""

import argparse
import time

import jax
import jax.numpy as jnp
from benchmark_model import planned, student_step

from vimd_jax.config import default_config
from vimd_jax.models import create_model


def classifier_memory(depth: int, remat: bool, batch: int) -> tuple[int, int]:
    """Temporary bytes of the gradient of a Vim-tiny (stride 8), and the bytes of one state."""
    model = create_model("vim_tiny_stride8", num_classes=200, depth=depth, remat=remat)
    images = jax.ShapeDtypeStruct((batch, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    gradient = jax.jit(jax.grad(lambda variables, images: model.apply(variables, images, train=True).sum()))
    memory = gradient.lower(variables, images).compile().memory_analysis()
    return memory.temp_size_in_bytes, batch * 730 * model.embed_dim * 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[24, 48], help="of the compiled training steps")
    parser.add_argument("--step_batch", type=int, default=16, help="of the training steps whose memory is given")
    parser.add_argument("--memory_depths", type=int, nargs="+", default=[6, 12, 24])
    parser.add_argument("--batch", type=int, default=4, help="of the memory table")
    args = parser.parse_args()

    print("| depth | remat | trace and lower (s) | compile (s) |\n|---|---|---|---|")
    for depth in args.depths:
        for remat in (False, True):
            config = default_config("student")
            config.teacher.depth = config.student.depth = depth
            config.student.remat = remat
            step, *arguments = student_step(config, batch=1)
            start = time.perf_counter()
            lowered = step.lower(*arguments)
            middle = time.perf_counter()
            lowered.compile()
            end = time.perf_counter()
            print(f"| {depth} | {remat} | {middle - start:.1f} | {end - middle:.1f} |", flush=True)

    print(f"\n| training step, batch {args.step_batch} | remat | GB |\n|---|---|---|")
    for dtype in ("float32", "bfloat16"):
        for remat in (False, True):
            config = default_config("student")
            config.student.dtype = config.teacher.dtype = dtype
            config.student.remat = remat
            step, *arguments = student_step(config, args.step_batch)
            print(f"| {dtype} | {remat} | {planned(step.lower(*arguments).compile()) / 1e9:.1f} |", flush=True)

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
