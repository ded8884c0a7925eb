"""Write the averaged weights of a training state as a model directory (float16 safetensors).

python -m examples.showo2_shapes.publish runs/shapes/state.pt flashu_compile/models/showo2_shapes
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer

from examples.showo2_shapes.saving import save_model
from examples.showo2_shapes.train import TOKENIZER, VAE, shapes_config
from flashu_compile.models.showo2.modeling import Showo2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("state", type=Path)
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    network = Showo2(shapes_config(tokenizer.get_vocab_size()))
    state = torch.load(arguments.state, weights_only=True)
    network.load_state_dict(state["average"])
    arguments.directory.mkdir(parents=True, exist_ok=True)
    save_model(arguments.directory, network, tokenizer, VAE, dtype=torch.float16)
    print(f"step {state['step']}: wrote {arguments.directory}")


if __name__ == "__main__":
    main()
