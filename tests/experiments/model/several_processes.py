"""One of several processes that quantize a tiny model: torchrun … several_processes.py BATCH_TOKENS OVERRIDE …"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

import torch
from hydra import compose, initialize_config_dir

from experiments import quantize_model
from experiments.config import CONF_DIR
from experiments.model import walk


def main(batch_tokens: int, overrides: list[str]) -> int:
    torch.set_num_threads(1)
    walk.BATCH_TOKENS = {"cpu": batch_tokens}
    with initialize_config_dir(config_dir=str(CONF_DIR), version_base="1.3"):
        composed = compose("quantize_model", overrides=overrides)
    quantize_model.run(composed, quantize_model.CONSOLE)
    torch.distributed.destroy_process_group()
    return quantize_model.CONSOLE.close()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
