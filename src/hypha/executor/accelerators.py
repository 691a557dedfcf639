"""``python -m hypha.executor.accelerators``: what torch makes of this machine's GPUs, as one line of JSON.

``hypha doctor`` runs it in a child process, with the Python that executors are started with: importing torch
takes seconds, and a driver that hangs holds up the child alone. Named are NVIDIA's CUDA, AMD's ROCm (a torch
built with it calls its devices CUDA's, too) and Apple's MPS.
"""

from __future__ import annotations

import json
from typing import Any


def described() -> dict[str, Any]:
    """``torch`` and ``transformers`` are versions, ``built_for`` the toolkit's that torch was built for,
    empty for none; ``usable`` is the number of devices, ``problem`` why one of the two cannot be imported.
    """
    try:
        import torch
        import transformers
    except Exception as exc:  # noqa: BLE001 - whatever a broken installation raises is the answer
        return {"problem": f"{type(exc).__name__}: {str(exc).splitlines()[0] if str(exc) else 'no reason'}"}
    built_for = torch.version.cuda or torch.version.hip or ""
    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not usable and torch.backends.mps.is_available():
        built_for, usable = "MPS", 1
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "built_for": built_for,
        "usable": usable,
        "problem": "",
    }


def main() -> None:
    print(json.dumps(described()))


if __name__ == "__main__":
    main()
