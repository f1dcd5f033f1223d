# Sourced by sample_cifar.sh, sample_lsun.sh and sample_imagenet.sh: checkpoint, calibration, images,
# FID. Needs CONFIG, RUN and REFERENCE; arguments go to sample_diffusion.py. A second run continues.
. scripts/environment.sh

"$PYTHON" scripts/download.py --config "$CONFIG"
"$PYTHON" calibrate.py --config "$CONFIG" --out "$RUN" --resume
"$PYTHON" sample_diffusion.py --config "$CONFIG" --quantized "$RUN/quantized.safetensors" \
    --out "$RUN/images" "$@"
"$PYTHON" scripts/evaluate.py --prepare-inception >/dev/null
if [ ! -e "$REFERENCE" ] && [ "${CIFAR10:-}" = yes ]; then
    IMAGES=checkpoints/cifar10_train_images.npz
    [ -e "$IMAGES" ] || "$PYTHON" scripts/download.py --cifar10-reference "$IMAGES"
    "$PYTHON" scripts/evaluate.py "$IMAGES" --save-stats "$REFERENCE"
fi
echo "TORCH_HOME=.cache/torch $PYTHON -m pytorch_fid $REFERENCE $RUN/images"
if [ ! -e "$REFERENCE" ]; then
    echo "error: $REFERENCE: no such reference; set REFERENCE to the training images (a folder) or to" \
        "their pytorch-fid statistics (.npz), then run again: the images are kept" >&2
    exit 2
fi
TORCH_HOME=.cache/torch "$PYTHON" -m pytorch_fid "$REFERENCE" "$RUN/images"
