"""Runs `scripts/run_r1_grpo.py`, or with --figures `scripts/measured_run.py`, on vLLM's CPU build.

The one place where a test steps between our code and the libraries, because two things cannot run
without a GPU:

- The CPU build packs the linear layers for oneDNN, after which no weights can be loaded into them.
  Switched off.
- Server mode sends the weights over NCCL. The two calls of TRL's client that do so are cut out: the
  server keeps its first weights. `--stale-weights` cuts the sending of colocated mode, too, to show
  that the alarm for stale weights works.

`--failing-worker` leaves TRL's call that sends the weights, and has only NCCL wait for ever: the
server was not told where to fetch them, so its worker fails.

`--keep-engine` leaves out `quirks.end_colocated_vllm`, and `--keep-engines-seed`
`quirks.seed_colocated_vllm`, to show what they are for.
"""

import os
import runpy
import sys
import threading
from pathlib import Path

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_CI_ENV": "1"}

if __name__ == "__main__":
    import vllm._custom_ops
    import vllm.model_executor.layers.utils

    vllm._custom_ops._supports_onednn = False
    vllm.model_executor.layers.utils.check_cpu_sgl_kernel = lambda n, k, dtype: False

    from trl.generation import vllm_client
    from trl.generation.vllm_client import VLLMClient
    from trl.generation.vllm_generation import VLLMGeneration

    from mini_r1 import quirks

    VLLMClient.init_communicator = lambda self, device=0: None
    if "--failing-worker" in sys.argv:
        sys.argv.remove("--failing-worker")
        vllm_client.packed_nccl_broadcast_producer = lambda **options: threading.Event().wait()
    else:
        VLLMClient.update_named_params = lambda self, metadata, params: [None for _ in params]
    if "--stale-weights" in sys.argv:
        sys.argv.remove("--stale-weights")
        VLLMGeneration.sync_weights = lambda self, *args, **kwargs: None
    if "--keep-engine" in sys.argv:
        sys.argv.remove("--keep-engine")
        quirks.end_colocated_vllm = lambda trainer: None
    if "--keep-engines-seed" in sys.argv:
        sys.argv.remove("--keep-engines-seed")
        quirks.seed_colocated_vllm = lambda args: None
    script = "measured_run.py" if "--figures" in sys.argv else "run_r1_grpo.py"
    runpy.run_path(str(Path(__file__).parents[2] / "scripts" / script), run_name="__main__")
