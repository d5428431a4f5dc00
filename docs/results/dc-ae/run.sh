#!/bin/sh
# Every figure of docs/dc-ae.md, from photographs to pictures. Stopped and started again, it goes on.
#   PHOTOS=folder LARGE=folder sh docs/results/dc-ae/run.sh
# PHOTOS: a few hundred photographs of 256 px and more. LARGE: 20 or so of 1024 px and more.
set -e
: "${PHOTOS:?a folder of photographs}" "${LARGE:?a folder of photographs of 1024 px and more}"
DAVAE=${DAVAE:-davae}; RUNS=${RUNS:-runs/dc-ae}; OUT=${OUT:-docs/results/dc-ae}

# The resolution gap and the three phases, measured on 8 large photographs that no phase trains on.
gap="--recipe dc-ae-small-f32 data.path=$PHOTOS data.hold_out=8 measure.path=$LARGE"
$DAVAE train dc-ae $gap --phase 1 --out "$RUNS/f32-phase1" phase1.loop.report_to=[]
$DAVAE train dc-ae $gap --phase 2 --out "$RUNS/f32-phase2" --from "$RUNS/f32-phase1" phase2.loop.report_to=[]
$DAVAE train dc-ae $gap --phase 3 --out "$RUNS/f32-phase3" --from "$RUNS/f32-phase2" phase3.loop.report_to=[]
# Control: phase 2's layers and steps at low resolution.
$DAVAE train dc-ae $gap --phase 2 --out "$RUNS/f32-phase2-at-128px" --from "$RUNS/f32-phase1" phase2.loop.report_to=[] \
    phase2.resolution=128 phase2.loop.batch_size=8 phase2.loop.validate_every=0

# Residual autoencoding, and SD-VAE, at f64: equal steps, images and parameters.
for name in dc-ae-small-f64 dc-ae-small-f64-plain sd-vae-small-f64; do
    $DAVAE train dc-ae --recipe $name --phase 1 --out "$RUNS/$name" data.path="$PHOTOS" data.hold_out=40 phase1.loop.report_to=[]
done

${PYTHON:-python} "$(dirname "$0")/figures.py" "$RUNS" "$OUT"
