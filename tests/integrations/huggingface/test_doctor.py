"""What optsample doctor says of the transformers that is installed."""

import transformers

from optsample_triton import cli
from optsample_triton.integrations.huggingface import trial


def test_it_tries_what_is_installed(capsys):
    assert cli.main(["doctor"]) == 0
    output = capsys.readouterr().out
    assert transformers.__version__ in output
    assert "generate, score and the logits processor with two tiny models: ok" in output


def test_it_says_in_one_sentence_what_fails(capsys, monkeypatch):
    """As when a release renames what this package uses."""

    def generate(*args, **kwargs):
        raise TypeError("forward() got an unexpected keyword argument\nand more of it")

    monkeypatch.setattr(trial, "generate", generate)
    monkeypatch.setattr(cli, "_TESTED", {"transformers": "1.0"})
    assert cli.main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.endswith("FAILED: TypeError: forward() got an unexpected keyword argument") for line in lines)
    found = f"generate with transformers {transformers.__version__} raised TypeError."
    assert lines[-1] == f"To do: pip install 'transformers==1.0', the newest that was tested, since {found}"
