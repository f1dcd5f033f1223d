#!/bin/sh
# ImageNet 256 with LDM-4, class-conditional: W4A8, 50,000 images of balanced classes, 250 DDIM steps,
# eta 0, guidance 1.5, then FID.
#   sh sample_imagenet.sh [options of sample_diffusion.py, for example --steps 20 --scale 3.0]
# Fetches the public checkpoint if it is absent. CONFIG, RUN and REFERENCE (a folder of training
# images, or a .npz of their pytorch-fid statistics) can be set from outside.
set -eu
cd "$(dirname "$0")"
CONFIG=${CONFIG:-configs/imagenet256.yaml}
RUN=${RUN:-runs/imagenet256-w4a8}
REFERENCE=${REFERENCE:-checkpoints/imagenet256_train.npz}
. scripts/sample_and_score.sh
