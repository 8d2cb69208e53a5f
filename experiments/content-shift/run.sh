#!/usr/bin/env bash
# Everything behind the tables here, on the embedded model: bash experiments/content-shift/run.sh DATA
# Stopped, it goes on where it was. About two hours on two cores (the techniques are trained already: see weights/README.md).
set -euo pipefail
DATA=$1 HERE=$(dirname "$0") OUT=runs/content-shift
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
LANDMARKS=36,39,42,45,30,31,35,48,54,51,57,8,0,16,4,12,17,21,22,26
for of in birds faces; do python "$HERE/evidence.py" pairs --of $of --data "$DATA" --count 100; done
python "$HERE/evidence.py" camvid --data "$DATA"
for of in birds faces camvid; do
    for stage in shift baselines; do python "$HERE/evidence.py" $stage --of $of --data "$DATA" --count 100; done
done
python "$HERE/evidence.py" amalgam --of faces --data "$DATA" --count 100
denoscope tune seedling --pairs "$DATA/faces/dev.parquet" --set jitter=true --set points=$LANDMARKS --set pairs_drawn=60 --holdout 0.5 \
    --techniques "$HERE/techniques_faces.toml" --t 0,20,101,261 --sites up.0,up.1,up.1.resnet.1,up.0+up.1,up.2 --ensembles 1,4 \
    --budget 3000 --exhaustive --out $OUT/tune-faces.toml
denoscope bench camvid --data "$DATA/camvid" --set runs=1 --set shots=5 --baselines --out $OUT/camvid-baselines
denoscope train amalgam --pairs "$DATA/faces/train.parquet" --techniques "$HERE/techniques_faces.toml" --t 20 --site up.1 --size long64 \
    --ensemble 1 --head nn --limit 120 --steps 300 --every 50 --out $OUT/amalgam-learned.safetensors
# tune with masks and without labels, each against its whole grid; the choice with masks by the networks of 'segment' too
mkdir -p $OUT/camvid-examples
for as in images:train masks:trainannot; do ln -sfn "$(realpath "$DATA/camvid/${as#*:}")" "$OUT/camvid-examples/${as%:*}"; done
GRID=(--t 0,20,101,261 --sites up.0,up.1,up.1.resnet.1,up.2 --ensembles 1,4 --exhaustive)
denoscope tune seedling --masks $OUT/camvid-examples --ignore 11 --holdout 0.5 --techniques "$HERE/techniques_few_camvid.toml" "${GRID[@]}" \
    --budget 1000 --out $OUT/tune-camvid.toml
SHOTS=(--set runs=2 --set shots=8 --set pixels=200)
denoscope bench camvid --data "$DATA/camvid" "${SHOTS[@]}" --out $OUT/camvid-preset
denoscope bench camvid --data "$DATA/camvid" "${SHOTS[@]}" --recipe $OUT/tune-camvid.toml --out $OUT/camvid-tuned
denoscope bench camvid --data "$DATA/camvid" "${SHOTS[@]}" --t 0 --site up.0 --ensemble 4 --prompt "a photo of a car" --out $OUT/camvid-best   # of the grid
denoscope bench camvid --data "$DATA/camvid" "${SHOTS[@]}" --t 261 --site up.2 --ensemble 1 --out $OUT/camvid-worst
python "$HERE/tuned.py" pictures --data "$DATA" --count 20
denoscope tune seedling $OUT/pictures-faces --techniques "$HERE/techniques_few_faces.toml" "${GRID[@]}" --budget 1500 --out $OUT/tune-faces-unlabelled.toml
python "$HERE/tuned.py" judge --data "$DATA" --count 40
python "$HERE/tuned.py" report
python "$HERE/evidence.py" report
