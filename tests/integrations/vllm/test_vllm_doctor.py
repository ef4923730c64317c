"""What optsample doctor says of the vLLM that is installed."""

from optsample_triton import cli


def doctor(capsys, *options):
    code = cli.main(["doctor", *options])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("vLLM engine ")]
    return code, line


def test_it_starts_an_engine_on_request(capsys):
    code, line = doctor(capsys, "--vllm")
    assert line.endswith("an engine with the logits processor, and its records: ok")
    assert code == 0
    _, line = doctor(capsys)
    assert line.endswith("not tried, since it may take some minutes: optsample doctor --vllm")
