#!/usr/bin/env bash
# Measures the student of a dataset on its test images: scripts/test.sh cub [--config.field=value ...]
set -euo pipefail
dataset=${1:?name a dataset: cub, cars, dogs, pets, flowers, mit67, action or aircraft}
cd "$(dirname "$0")/.."
python -m vimd_jax.evaluate --config "configs/student_$dataset.py" --workdir "workdir/student_$dataset" "${@:2}"
