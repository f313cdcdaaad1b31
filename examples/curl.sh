#!/usr/bin/env bash
# Cog's HTTP API with curl: examples/curl.sh [folder for the images]
set -euo pipefail
url=${FLUX_URL:-http://127.0.0.1:5000}
out=${1:-.}
examples=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "$out"
quick='"model": "schnell", "num_inference_steps": 4, "megapixels": "0.25", "output_format": "png"'

data_uri() { printf 'data:%s;base64,%s' "$2" "$(base64 < "$1" | tr -d '\n')"; }
# One prediction at a time: the server answers 409 while it is busy, so the call is repeated.
call() { curl -sS --fail-with-body --retry 60 --retry-delay 1 --retry-all-errors -H 'Content-Type: application/json' "$@"; }
predict() { call -d @- "$url/predictions"; }
save() { jq -er '.output[0]' | sed 's/^[^,]*,//' | base64 -d > "$1"; echo "wrote $1"; }

echo "{\"input\": {\"prompt\": \"a red circle on a white background\", $quick}}" | predict | save "$out/text.png"

image=$(data_uri "$examples/photo.jpg" image/jpeg)
mask=$(data_uri "$examples/mask.png" image/png)
lora=$(data_uri "$examples/../tests/data/loras/tok-style.safetensors" application/octet-stream)
object=$(data_uri "$examples/../tests/data/loras/tok-object.safetensors" application/octet-stream)
echo "{\"input\": {\"prompt\": \"a green heart on a white background\", \"image\": \"$image\", $quick}}" | predict | save "$out/image.png"
echo "{\"input\": {\"prompt\": \"a red square on a white background\", \"image\": \"$image\", \"mask\": \"$mask\", $quick}}" |
    predict | save "$out/mask.png"
echo "{\"input\": {\"prompt\": \"a red circle on a white background\", \"replicate_weights\": \"$lora\", $quick}}" |
    predict | save "$out/lora.png"
# Several LoRAs: one a line, each with its scale behind a blank; extra_lora_scale multiplies them.
echo "{\"input\": {\"prompt\": \"a red TOK on a white background\", \"extra_lora\": \"$lora 0.7\\n$object 1\", $quick}}" |
    predict | save "$out/loras.png"

# In the background: PUT with a name of our own and Prefer: respond-async answers 202 at once. Without a webhook the result
# is not kept, so this one is cancelled.
slow='{"input": {"prompt": "a blue star on a yellow background", "num_inference_steps": 50}}'
echo "$slow" | call -X PUT -H 'Prefer: respond-async' -d @- "$url/predictions/slow" | jq -r '"slow: \(.status)"'
sleep 0.2 # a server may lose the cancellation that comes with the prediction itself
call -X POST "$url/predictions/slow/cancel" > /dev/null && echo "slow: canceled"
