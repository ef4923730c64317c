"""What optsample doctor says of the vLLM that is installed."""

from optsample_triton import cli


def doctor(capsys, *options):
    code = cli.main(["doctor", *options])
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("vLLM engine ")]
    return code, line, lines[-1]


def test_it_starts_an_engine_on_request(capsys):
    code, line, last = doctor(capsys, "--vllm")
    assert line.endswith("an engine with the logits processor, and its records: ok")
    assert code == 0
    assert "vLLM engine" not in last
    _, line, last = doctor(capsys)
    assert line.endswith("not tried, since it may take some minutes: optsample doctor --vllm")
    assert "vLLM engine (optsample doctor --vllm)" in last
