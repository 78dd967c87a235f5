#!/usr/bin/env bash
# Trains the student of a dataset, taught by scripts/train_teacher.sh's network:
#   scripts/train_student.sh cub --config.sr.init=SRResNet_x4-ImageNet-6dd5216c.pth.tar [--config.field=value ...]
set -euo pipefail
dataset=${1:?name a dataset: cub, cars, dogs, pets, flowers, mit67, action or aircraft}
cd "$(dirname "$0")/.."
python -m vimd_jax.train --config "configs/student_$dataset.py" --workdir "workdir/student_$dataset" \
  --config.teacher.init="workdir/teacher_$dataset" "${@:2}"
