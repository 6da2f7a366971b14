"""The training script beside a stub of vLLM: the real one, but transformers generates.

Before that it asks the stub once, and has it come for the weights, as TRL's client would.
"""

import os
import runpy
import socket
import sys
from pathlib import Path

import requests

from mini_r1 import quirks
from mini_r1.launch.guard import key_header

if __name__ == "__main__":
    server = sys.argv[sys.argv.index("--vllm_server_base_url") + 1]
    quirks.show_key(server, key_header())
    requests.get(f"{server}/v1/models").raise_for_status()
    if os.environ.get("RANK", "0") == "0":
        port = int(sys.argv[sys.argv.index("--vllm_group_port") + 1])
        with socket.create_server((os.environ["VLLM_HOST_IP"], port)):
            where = {"master_address": os.environ["VLLM_HOST_IP"], "master_port": port}
            path = "init_weight_transfer_engine"
            asked = requests.post(f"{server}/{path}", json={"init_info": where})
            asked.raise_for_status()
        print(f"the server came for the weights to {where}")
    kept = []
    for position, argument in enumerate(sys.argv):
        of_vllm = argument.startswith("--vllm") or sys.argv[position - 1].startswith("--vllm")
        kept += [] if of_vllm else [argument]
    sys.argv = [*kept, "--use_vllm", "false"]
    script = Path(__file__).parents[2] / "scripts" / "run_r1_grpo.py"
    runpy.run_path(str(script), run_name="__main__")
