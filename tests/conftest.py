"""Shared inputs: a tiny model made on the spot, and the real data beside the checkout."""

import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models; two threads only wait for each other
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # what is tested is the same everywhere

import pytest
import runs

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pytest_collection_finish() -> None:
    if "datasets" in sys.modules:  # else nothing is prepared, and it need not be imported
        runs.save_in_this_process()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    # A training collects garbage eight times, which takes as long as all the rest of it where the
    # objects of all that was imported are looked at. `plan` ends by unfreezing them.
    if gc.get_freeze_count() < 100_000:  # Python itself freezes a few hundred
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden cases and real data beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("needs the folder ../shared (golden cases, real data), which is not here")
    return SHARED


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level BPE trained on a few sentences of our own data; ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<unk>", "<s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((runs.QUICKSTART / "train.jsonl").open(encoding="utf-8"), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<unk>",
        chat_template=CHATML,
    )


@pytest.fixture(scope="session")
def tiny_model(tokenizer, tmp_path_factory) -> Path:
    """A Llama of two layers with random weights, as a folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny") / "model"
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=3,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory, tiny_model):
    """A model whose answers depend on the whole question, unlike those of fresh weights."""
    import torch
    from transformers import AutoModelForCausalLM

    path = tmp_path_factory.mktemp("steered") / "base"
    shutil.copytree(tiny_model, path)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(12 if weight.ndim > 1 else 1)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def adapter(tmp_path_factory, base):
    """An adapter that changes the model, as training would leave it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tmp_path_factory.mktemp("steered") / "adapter"
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, lora_alpha=64)
    get_peft_model(model, lora).save_pretrained(path)
    AutoTokenizer.from_pretrained(base).save_pretrained(path)
    runs.steering().save(path)
    return path


@pytest.fixture(scope="session")
def forks():
    """Runs a call of a module's function in several processes, see `fork_server`.

    All of them are forked from one that has imported what the workers' modules need, which takes
    longer than most jobs. Fails with what the processes have printed where one goes wrong.
    """
    server = Path(__file__).parent / "fork_server.py"
    modules = ["checkpoint_worker", "parallel_worker", "prepare_worker", "sharded_worker"]
    with subprocess.Popen(
        [sys.executable, server, *modules],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:

        def run(world: int, folder: Path, module: str, function: str, *arguments: str) -> None:
            job = {"world": world, "folder": str(folder), "call": [module, function, *arguments]}
            print(json.dumps(job), file=process.stdin, flush=True)
            wrong = json.loads(process.stdout.readline())
            logs = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("?.log"))]
            assert not wrong, "\n".join([wrong, *(log[-4000:] for log in logs)])

        yield run
        process.stdin.close()
