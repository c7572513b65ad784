#!/usr/bin/env bash
# Make the session that README.md shows: optimize the digits example for this CPU. Needs `make setup`.
set -euo pipefail
cd "$(dirname "$0")/.."
.venv/bin/python examples/digits/train.py --data-only
cd examples/digits
exec ../../.venv/bin/xopt optimize digits_vit.onnx --target cpu \
  --passes 'prune-heads{keep=0.75, ffn=true},merge-tokens{ratio=0.3}' \
  --data calibration.npz --eval-data test.npz --max-drop 0.01 --batch 32 -o ../../out/digits
