#!/usr/bin/env bash
# Trains the teacher of a dataset: scripts/train_teacher.sh cub [--config.field=value ...]
set -euo pipefail
dataset=${1:?name a dataset: cub, cars, dogs, pets, flowers, mit67, action or aircraft}
cd "$(dirname "$0")/.."
python -m vimd_jax.train --config "configs/teacher_$dataset.py" --workdir "workdir/teacher_$dataset" "${@:2}"
