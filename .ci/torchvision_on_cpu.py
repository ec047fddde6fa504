"""Makes torchvision load beside a CPU build of torch, in the environment that runs this.

PyPI's torchvision is built for CUDA, and so are torchaudio and torchcodec. Their libraries don't load beside a torch
built for CPUs, and what torchvision says of its operators fails: "operator torchvision::nms does not exist". Whoever
serves on a CPU takes torchvision from PyTorch's own index for CPUs, which CI may not reach. Here the two operators are
declared, which nothing calls, and the other two libraries are taken away, as vLLM and transformers do without.

    python .ci/torchvision_on_cpu.py
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

DECLARED = """import torch
torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
torch.library.define("torchvision::qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""

if __name__ == "__main__":
    subprocess.run([sys.executable, "-m", "pip", "uninstall", "-q", "-y", "torchaudio", "torchcodec"], check=True)
    file = Path(find_spec("torchvision").origin).with_name("_meta_registrations.py")
    source = file.read_text(encoding="utf-8")
    if not source.startswith(DECLARED):
        file.write_text(DECLARED + source, encoding="utf-8")
    subprocess.run([sys.executable, "-c", "import torchvision"], check=True)
