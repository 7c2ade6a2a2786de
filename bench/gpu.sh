#!/usr/bin/env bash
# The GPU tests and benchmarks in one run of under ten minutes; JSON goes to $OUT, or to bench/results/.
# Needs a GPU, and torch, triton, transformers, tqdm and pytest already installed; hasten itself is installed without
# its dependencies.
set -euo pipefail
cd "$(dirname "$0")/.."
results=${OUT:-bench/results}
mkdir -p "$results"
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
name=$(python3 -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-") if torch.cuda.is_available() else "")')
if [ -z "$name" ]; then
    echo "no GPU here: skipped"
    exit 0
fi
python3 -m pip install --quiet --no-deps --no-build-isolation --editable .
status=0
timeout 160 python3 -m pytest -q -m gpu tests/kernels tests/guidance/test_gpu_guidance.py || status=1
timeout 100 hasten bench 'linear * batch ? bfloat16' 'column_sparse_linear 4096->*bfloat16' row_sparse_linear 'token_scores 1 query*3000*bfloat16' 'gather_tokens 750*' --json "$results/kernels-$name.json" || status=1
timeout 120 hasten bench linear_attention linear_attention_step delta_rule delta_rule_step --json "$results/linear-attention-$name.json" || status=1
timeout 120 python3 -m hasten.bench.runtime.gpu_decode --json "$results/decode-$name.json" || status=1
timeout 100 python3 -m hasten.bench.runtime.vision_tokens --device cuda --large --rounds 3 --json "$results/vision-tokens-$name.json" || status=1
exit $status
