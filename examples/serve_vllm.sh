#!/usr/bin/env bash
# Start vLLM's server on this machine with a pruned model, and ask it about an image: under a budget of the request's own,
# under one that is too large, which is an error for that request alone, and under the server's.
#
#     examples/serve_vllm.sh MODEL IMAGE QUESTION [further options of vLLM ...]
set -euo pipefail
if [[ $# -lt 3 ]]; then
  sed -n '2,5s/^# \{0,1\}//p' "$0"
  [[ ${1:-} == --help ]]
  exit
fi
model=$1 image=$2 question=$3
shift 3
python=${PYTHON:-python} url=http://127.0.0.1:${PORT:-8000}

overrides=$("$python" -m vltok.serving "$model" divprune,keep_ratio=0.25 --max-keep-ratio 0.5)
"$python" -m vllm.entrypoints.openai.api_server --model "$model" --host 127.0.0.1 --port "${PORT:-8000}" \
  --hf-overrides "$overrides" --trust-request-mm-kwargs "$@" &
server=$!
trap 'kill "$server" 2>/dev/null || true; wait "$server" || true' EXIT
until curl --silent --fail "$url/health" >/dev/null; do
  kill -0 "$server" || exit 1  # it has ended, and has said why
  sleep 2
done

ask() {  # ask BUDGET: prints the status and what the server answers
  "$python" - "$model" "$image" "$question" "$1" <<'PY' |
import base64, json, pathlib, sys
model, image, question, budget = sys.argv[1:]
data = base64.b64encode(pathlib.Path(image).read_bytes()).decode()
content = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}, {"type": "text", "text": question}]
body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 32, "temperature": 0}
print(json.dumps(body | {"mm_processor_kwargs": json.loads(budget)}))
PY
    curl --silent --write-out 'status %{http_code}\n' --json @- "$url/v1/chat/completions"
}
ask '{"visual_keep_ratio": 0.5}'
ask '{"visual_keep_ratio": 1.0}'
ask '{}'
