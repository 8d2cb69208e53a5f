#!/usr/bin/env bash
# Everything behind the tables here, on the embedded model: bash experiments/content-shift/run.sh DATA
# Stopped, it goes on where it was. About an hour on two cores (the techniques are trained already: see weights/README.md).
set -euo pipefail
DATA=$1 HERE=$(dirname "$0") OUT=runs/content-shift
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
LANDMARKS=36,39,42,45,30,31,35,48,54,51,57,8,0,16,4,12,17,21,22,26
for of in birds faces; do python "$HERE/evidence.py" pairs --of $of --data "$DATA" --count 100; done
python "$HERE/evidence.py" camvid --data "$DATA"
python "$HERE/evidence.py" amalgam --of faces --data "$DATA" --count 100
python "$HERE/evidence.py" report
denoscope tune seedling --pairs "$DATA/faces/dev.parquet" --set jitter=true --set points=$LANDMARKS --set pairs_drawn=60 --holdout 0.5 \
    --techniques "$HERE/techniques_faces.toml" --t 0,20,101,261 --sites up.0,up.1,up.1.resnet.1,up.0+up.1,up.2 --ensembles 1,4 \
    --budget 3000 --exhaustive --out $OUT/tune-faces.toml
denoscope bench camvid --data "$DATA/camvid" --set runs=1 --set shots=5 --baselines --out $OUT/camvid-baselines
denoscope train amalgam --pairs "$DATA/faces/train.parquet" --techniques "$HERE/techniques_faces.toml" --t 20 --site up.1 --size long64 \
    --ensemble 1 --head nn --limit 120 --steps 300 --every 50 --out $OUT/amalgam-learned.safetensors
