"""Two random models on disk for tests of files; tests of numbers train their own."""

import os

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
}

import pytest
import torch
from making import make_model, make_tokenizer, save

torch.set_num_threads(1)  # also for the processes that are forked from this one


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """name -> folder: a policy, a target, and the same with a chat template."""
    folder = tmp_path_factory.mktemp("models")
    plain, chat = make_tokenizer(), make_tokenizer(chat=True)
    policy, target = make_model(len(plain), seed=1), make_model(len(plain), seed=2)
    return {
        "policy": save(folder / "policy", policy, plain),
        "target": save(folder / "target", target, plain),
        "chat": save(folder / "chat", policy, chat),
    }
