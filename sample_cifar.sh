#!/bin/sh
# CIFAR-10 as in the paper: W4A8, 50,000 images, 100 quad steps, then FID.
#   sh sample_cifar.sh [options of sample_diffusion.py]
# Fetches the public checkpoint (143 MB) if it is absent. A second run continues. REFERENCE names
# the training images: a folder, or a .npz of pytorch-fid statistics.
set -eu
cd "$(dirname "$0")"
. scripts/environment.sh

CONFIG=${CONFIG:-configs/cifar10.yaml}
RUN=${RUN:-runs/cifar10-w4a8}
REFERENCE=${REFERENCE:-checkpoints/cifar10_train.npz}

"$PYTHON" scripts/download.py --config "$CONFIG"
"$PYTHON" calibrate.py --config "$CONFIG" --out "$RUN" --resume
"$PYTHON" sample_diffusion.py --config "$CONFIG" --quantized "$RUN/quantized.safetensors" \
    --out "$RUN/images" "$@"
"$PYTHON" scripts/evaluate.py --prepare-inception >/dev/null
if [ ! -e "$REFERENCE" ]; then
    IMAGES=checkpoints/cifar10_train_images.npz
    [ -e "$IMAGES" ] || "$PYTHON" scripts/download.py --cifar10-reference "$IMAGES"
    "$PYTHON" scripts/evaluate.py "$IMAGES" --save-stats "$REFERENCE"
fi
echo "TORCH_HOME=.cache/torch $PYTHON -m pytorch_fid $REFERENCE $RUN/images"
TORCH_HOME=.cache/torch "$PYTHON" -m pytorch_fid "$REFERENCE" "$RUN/images"
