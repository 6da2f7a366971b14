"""Runs `scripts/run_r1_grpo.py` with a CPU build of vLLM: vllm_on_cpu.py [--stale-weights] --config RECIPE [--key value ...]

The one place where a test steps between our code and the libraries, because two things cannot run without a GPU:

- The CPU build packs the linear layers for oneDNN, after which no weights can be loaded into them. Switched off.
- Server mode sends the weights over NCCL. The two calls of TRL's client that do so are cut out: the server keeps its first weights.
  `--stale-weights` cuts the sending of colocated mode, too, to show that the alarm for stale weights works.
"""

import os
import sys

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_CI_ENV": "1"}

if __name__ == "__main__":
    import vllm._custom_ops
    import vllm.model_executor.layers.utils

    vllm._custom_ops._supports_onednn = False
    vllm.model_executor.layers.utils.check_cpu_sgl_kernel = lambda n, k, dtype: False

    from trl.generation.vllm_client import VLLMClient
    from trl.generation.vllm_generation import VLLMGeneration

    from mini_r1.cli import train_script

    VLLMClient.init_communicator = lambda self, device=0: None
    VLLMClient.update_named_params = lambda self, metadata, named_params: [None for _ in named_params]
    if "--stale-weights" in sys.argv:
        sys.argv.remove("--stale-weights")
        VLLMGeneration.sync_weights = lambda self, *args, **kwargs: None
    sys.exit(train_script())
