#!/usr/bin/env bash
# Every evaluation behind the tables here, on the embedded model: bash experiments/correspondence/run.sh DATA OUT
# Stopped, it goes on where it was. About an hour on one core.
set -euo pipefail
DATA=$1 OUT=$2
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
LANDMARKS=36,39,42,45,30,31,35,48,54,51,57,8,0,16,4,12,17,21,22,26 # the 20 of 68 that spair_style has too
bench() { denoscope bench "$@"; }

bench spair --data "$DATA/spair_style" --prompt "" --baselines --out "$OUT/spair"
bench spair --data "$DATA/spair_style" --set categories=bird,face --pictures 0 --out "$OUT/spair_prompt"
bench spair --data "$DATA/spair_style" --prompt "" --set categories=bird --set flip=true --set swaps=6-10,7-11,8-12 \
    --pictures 0 --out "$OUT/spair_flip"
bench keypoints --data "$DATA/birds/dev.parquet" --prompt "" --set label=bird --baselines --out "$OUT/birds"
bench keypoints --data "$DATA/faces/dev.parquet" --prompt "" --set label=face --set points=$LANDMARKS --set jitter=true \
    --baselines --out "$OUT/faces"
bench hpatches --data "$DATA/hpatches_style" --baselines --out "$OUT/hpatches"
bench hpatches --data "$DATA/hpatches_style" --set method=usac-magsac --baselines --pictures 0 --out "$OUT/hpatches_magsac"
bench dense --data "$DATA/dense_gt" --baselines --out "$OUT/dense"
bench animal --data "$DATA/animal_video/openfield_mouse" --baselines --out "$OUT/animal"
bench davis --data "$DATA/davis" --baselines --out "$OUT/davis"
denoscope sweep keypoints --data "$DATA/birds/dev.parquet" --set label=bird --set pairs_drawn=60 --prompt "" \
    --t 0,20,50,100,200,400 --site mid,up.0,up.1.resnet.1,up.1,up.2 --ensemble 1,4 --out "$OUT/sweep_birds"
denoscope sweep keypoints --data "$DATA/faces/dev.parquet" --set label=face --set points=$LANDMARKS --set jitter=true \
    --set pairs_drawn=60 --prompt "" --t 0,20,50,100,200,400 --site mid,up.0,up.1.resnet.1,up.1,up.2 --ensemble 1,4 \
    --out "$OUT/sweep_faces"
