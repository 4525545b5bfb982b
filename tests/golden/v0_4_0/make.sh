#!/bin/sh
# Makes what lies beside it, in the new folder $1, with the code of 0.4.0; see README.md.
set -eu
export JAX_PLATFORMS=cpu
mkdir "$1"

# Trains $1 to its end, and $1.killed until it is killed once its one checkpoint is that of step $2; the flags follow.
twice() {
  run=$1 step=$2
  shift 2
  set -- "$@" --config.log.every_steps=1 --config.log.batch_hash=True --config.log.tensorboard=False \
    --config.checkpoint.keep_latest=1 --config.checkpoint.keep_best=0
  python -m mnv2_jax.main "$@" --workdir="$run"
  python -m mnv2_jax.main "$@" --workdir="$run.killed" &
  until [ "$(ls "$run.killed/checkpoints")" = "$step" ]; do sleep 0.01; done 2>/dev/null
  kill -KILL $!
}

# MobileNetV2 with as few weights as its options allow.
twice "$1/digits" 45 --config=configs/w0_25.py:data=digits,batch=128,res=16 --config.model.width=0.01 \
  --config.model.width_rule=divisor4 --config.model.depth=0.2 --config.norm.decay=0.8 --config.train.steps=54 \
  --config.train.eval_every_epochs=2

# What else a checkpoint may hold: a moving average, what RMSProp keeps, and parts that are frozen. The
# weights that it begins with aren't kept.
python -m mnv2_jax.main --config=configs/v1_0_25.py:data=digits,batch=128,res=16,recipe=digits \
  --config.model.width=0.02 --config.norm.decay=0.8 --config.train.steps=400 --config.train.eval_every_epochs=0 \
  --workdir="$1/before"
python -m mnv2_jax.convert "$1/before" "$1/before.safetensors"
twice "$1/finetune" 23 --config=configs/v1_0_25.py:data=digits,batch=128,res=16,recipe=digits \
  --config.init.weights="$1/before.safetensors" --config.model.width=0.02 --config.norm.decay=0.8 \
  --config.optim.name=rmsprop --config.optim.epsilon=0.001 --config.optim.peak_lr=0.005 \
  --config.optim.ema_decay=0.9 --config.finetune.train_from="('classifier','block_6')" \
  --config.finetune.unfreeze_epochs="(2.5,)" --config.finetune.backbone_lr_factor=0.1 --config.train.steps=32 \
  --config.train.eval_every_epochs=2
python -m mnv2_jax.convert "$1/finetune.killed" "$1/finetune.safetensors"

# What 0.4.0 says of both, where they were killed.
mkdir "$1/images"
python - "$1/images" <<'END'
import sys
from PIL import Image
from sklearn.datasets import load_digits

for place, image in enumerate(load_digits().images[:40]):
    Image.fromarray((image * 255 / 16).round().astype("uint8")).save(f"{sys.argv[1]}/{place:02}.png")
END
mkdir "$1/files" "$1/files/digits" "$1/files/finetune"
for run in digits finetune; do
  mkdir "$1/$run.told"
  cp "$1/$run/metrics.jsonl" "$1/$run.told"
  python -m mnv2_jax.main --mode=eval --workdir="$1/$run.killed" --json >"$1/$run.told/eval.json"
  python -m mnv2_jax.predict --workdir="$1/$run.killed" --top=10 --json "$1/images" >"$1/$run.told/predict.json"
  cp -r "$1/$run.killed/." "$1/files/$run"
done
cp -r "$1/images" "$1/finetune.safetensors" "$1/files"
tar -C "$1/files" --sort=name --owner=0 --group=0 -cJf "$1/files.tar.xz" .
