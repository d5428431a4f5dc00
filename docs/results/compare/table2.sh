#!/bin/sh
# Autoencoders under one transformer at one token budget, in small: the table of docs/imagenet.md.
#   PHOTOS=folder CLASSES=folder sh docs/results/compare/table2.sh
# PHOTOS: the photographs that docs/results/dc-ae/run.sh trained its autoencoders on (RUNS). CLASSES: a folder of class
# folders, which the transformers learn. Started again, it goes on with the autoencoder and repeats the comparison.
set -e
: "${PHOTOS:?a folder of photographs}" "${CLASSES:?a folder of class folders}"
DAVAE=${DAVAE:-davae}; RUNS=${RUNS:-runs/dc-ae}; OUT=${OUT:-docs/results/compare}

# Detail channels over the small f32 DC-AE: f64, the same photographs, 256 px.
if [ ! -d "$RUNS/sana" ]; then
    ${PYTHON:-python} - "$RUNS/f32-phase2/autoencoder" "$RUNS/sana" <<'PYTHON'
import sys
from diffusers import AutoencoderDC, SanaTransformer2DModel
from davae.bases.debug_pipelines import small_pipeline

pipe = small_pipeline("sana")  # its random transformer is not used
pipe.vae = AutoencoderDC.from_pretrained(sys.argv[1])
channels = pipe.vae.config.latent_channels
pipe.transformer = SanaTransformer2DModel.from_config(
    pipe.transformer.config, in_channels=channels, out_channels=channels
)
pipe.save_pretrained(sys.argv[2])
PYTHON
fi
$DAVAE train autoencoder --recipe tiny --out "$RUNS/davae-f64" base="$RUNS/sana" data.path="$PHOTOS" \
    data.resolution=256 data.hold_out=32 autoencoder.model.detail_channels=96 autoencoder.loop.steps="${STEPS:-500}" \
    autoencoder.loop.validation_images=32 autoencoder.statistics_images=32 autoencoder.loop.report_to=[]

# 16 tokens of a 256 px image for each of them: f32 in patches of 2, f64 in patches of 1.
$DAVAE compare autoencoder sd-vae="$RUNS/sd-vae-small-f64/autoencoder" dc-ae="$RUNS/dc-ae-small-f64/autoencoder" \
    dc-ae-f32="$RUNS/f32-phase2/autoencoder" da-vae="$RUNS/davae-f64/autoencoder" \
    --data "$CLASSES" --resolution 256 --tokens 16 --images "${IMAGES:-64}" --train-images "${TRAIN_IMAGES:-1024}" \
    --transformer 192x6x4 --diffusion-steps "${DIFFUSION_STEPS:-800}" --diffusion-batch 32 \
    --samples "${SAMPLES:-256}" --sample-steps 25 --guidance 2 --repeats 3 \
    --features efficientnet-lite0 --device cpu --out "$OUT/table2"
