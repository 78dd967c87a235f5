"""configs/small.py with another family as the teacher: LocalVim teaches Vim, logits and hidden states.

Paper       ViMD (IEEE SPL 2025) and LocalMamba (https://arxiv.org/abs/2403.09338); the combination is ours
Command     python -m vimd_jax.train --config configs/small_local_vim.py --workdir workdir/small_local_vim \\
              --config.directory=DIR
Data        a folder: DIR/train/<class>/*.jpg, DIR/test/<class>/*.jpg
Network     as in configs/small.py, both without class token, so that their hidden states have the same shape
Measured    docs/benchmarks.md
"""

from vimd_jax.configs import small


def get_config():
    config = small.get_config()
    for stage in ("teacher", "student"):
        teacher = config.stages[stage].teacher
        teacher.name = "local_vim_tiny"
        teacher.directions = (("h", "h_flip", "w2", "w2_flip"),)
    config.stages.student.student.class_token = "none"
    return config
