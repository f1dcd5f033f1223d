#!/bin/sh
# CIFAR-10 as in the paper: W4A8, 50,000 images, 100 quad steps, then FID.
#   sh sample_cifar.sh [options of sample_diffusion.py]
# Fetches the public checkpoint (143 MB) and the training images if they are absent. CONFIG, RUN and
# REFERENCE (a folder of images, or a .npz of pytorch-fid statistics) can be set from outside.
set -eu
cd "$(dirname "$0")"
CONFIG=${CONFIG:-configs/cifar10.yaml}
RUN=${RUN:-runs/cifar10-w4a8}
REFERENCE=${REFERENCE:-checkpoints/cifar10_train.npz}
CIFAR10=yes
. scripts/sample_and_score.sh
