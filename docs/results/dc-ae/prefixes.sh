#!/bin/sh
# DC-AE 1.5 in small, trained on prefixes of channels and not, on drawn scenes: docs/results/dc-ae/prefixes.json.
#   sh docs/results/dc-ae/prefixes.sh
# BESIDE: what else the machine did, for the record.
set -e
DAVAE=${DAVAE:-davae}; RUNS=${RUNS:-runs/dc-ae15}; OUT=${OUT:-docs/results/dc-ae}; STEPS=${STEPS:-150}

for name in with without; do
    channels="[8,16,32,64]"; [ $name = with ] || channels="[]"
    $DAVAE train dc-ae --recipe dc-ae15-small-f64 --phase 1 --out "$RUNS/$name" phase1.loop.report_to=[] data.hold_out=64 \
        phase1.loop.validation_images=64 phase1.loop.validate_every=0 phase1.loop.steps="$STEPS" phase1.prefixes.channels="$channels"
done

${PYTHON:-python} - "$RUNS" "$OUT" "$STEPS" "${BESIDE:-nothing}" <<'PYTHON'
import json, sys
from datetime import date
from pathlib import Path

runs, out = Path(sys.argv[1]), Path(sys.argv[2])
found = {}
for name in ("with", "without"):
    summary, where = (json.loads((runs / name / f"{file}.json").read_text()) for file in ("summary", "environment"))
    found[f"{name} prefixes"] = {"parameters": summary["parameters"], **summary["after"]}
facts = {
    "command": f"STEPS={sys.argv[3]} sh docs/results/dc-ae/prefixes.sh",
    "hardware": f"{where['device']}, {where['cpu_count']} cores, {where['torch_threads']} thread a run; beside it: {sys.argv[4]}",
    "date": date.today().isoformat(),
    "packages": where["packages"],
}
(out / "prefixes.json").write_text(json.dumps({**facts, "figures": found}, indent=1) + "\n")
PYTHON
