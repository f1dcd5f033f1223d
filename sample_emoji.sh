#!/bin/sh
# The main job on the embedded checkpoint: sample 64 images in full precision, calibrate tinyDM at
# W4A8, sample the same images quantized, put them side by side, score them.
#   sh sample_emoji.sh [options of sample_diffusion.py, for example --count 256]
#   MODEL=emoji64 sh sample_emoji.sh        the latent one, a column a class
# A second run continues from what exists. Needs no network but the package index, once.
set -eu
cd "$(dirname "$0")"
. scripts/environment.sh

MODEL=${MODEL:-emoji32}
CONFIG=configs/$MODEL.yaml
RUN=runs/$MODEL-w4a8
COLUMNS=8
[ "$MODEL" != emoji64 ] || COLUMNS=9
# A first look; calibrate.py alone takes the numbers of the configuration: slower, a little better.
QUICK="quant.reconstruct.finetune_iterations=300"
[ "$MODEL" != emoji32 ] || QUICK="$QUICK calibration.samples=1024"

# First, so that an option that is refused costs no calibration.
"$PYTHON" sample_diffusion.py --config $CONFIG --out $RUN/images-fp "$@"
# shellcheck disable=SC2086 # several settings
"$PYTHON" calibrate.py --config $CONFIG --out $RUN --resume --set $QUICK
"$PYTHON" sample_diffusion.py --config $CONFIG --quantized $RUN/quantized.safetensors \
    --out $RUN/images-w4a8 "$@"
"$PYTHON" scripts/compare.py --run $RUN --full images-fp --quantized images-w4a8 \
    --reference "models/pretrained/${MODEL}_statistics.npz" --columns $COLUMNS
