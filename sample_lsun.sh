#!/bin/sh
# LSUN-Bedrooms 256 with LDM-4: W4A8, 50,000 images, 250 DDIM steps, eta 1, then FID.
#   sh sample_lsun.sh [options of sample_diffusion.py, for example --steps 50]
# Fetches the public checkpoint if it is absent. CONFIG, RUN and REFERENCE (a folder of training
# images, or a .npz of their pytorch-fid statistics) can be set from outside.
set -eu
cd "$(dirname "$0")"
CONFIG=${CONFIG:-configs/lsun_bedroom.yaml}
RUN=${RUN:-runs/lsun_bedroom-w4a8}
REFERENCE=${REFERENCE:-checkpoints/lsun_bedroom_train.npz}
. scripts/sample_and_score.sh
