"""``serving`` with a program that stands for vLLM: ready, dying, silent, babbling, stopped with its children."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from msp_plugin.errors import RecipeError, ServingError
from msp_plugin.verify import server as module
from msp_plugin.verify.served import greedy
from msp_plugin.verify.server import Completion, serving, vllm_executable

MODEL = Path("some-model")


def running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def is_gone(pid):
    for _ in range(100):
        if not running(pid):
            return True
        time.sleep(0.05)
    return False


def serve(environment, mode, **options):
    return serving(environment, MODEL, ["--mode", mode], **options)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    sleep = time.sleep
    monkeypatch.setattr(module.time, "sleep", lambda seconds: sleep(min(seconds, 0.05)))


@pytest.fixture(scope="module")
def environment(make_vllm):
    return make_vllm()


# ready


ANSWERS = {
    "1": {"code": 400, "text": '{"message": "prompt too long"}'},
    "2": {"code": 500, "text": ""},
    "3": {"code": 200, "text": "not JSON"},
    "4": {"code": 200, "text": "[]"},
    "5": {"code": 200, "text": "3"},
    "6": {"code": 200, "text": '{"choices": []}'},
    "7": {"code": 200, "text": '{"choices": [{"text": "hello"}]}'},
    "8": {"code": 200, "text": '{"choices": [{"token_ids": [1], "logprobs": null}]}'},
    "9": {
        "code": 200,
        "text": '{"choices": [{"token_ids": [1, 2], "logprobs": {"token_logprobs": [null, 0]}}]}',
    },
    "10": {"tokens": [1], "logprobs": [-1.0]},
    "11": {"tokens": [1, 2, 3], "logprobs": [-1.0, -1.0, -1.0]},
    "12": {"tokens": [1, 2], "logprobs": [-1.0]},
    "13": {"tokens": [8, 9], "logprobs": [-0.25, -1e-9]},
    "14": {"code": 200, "text": ""},
    "15": {"code": 200, "text": "null"},
    "16": {"tokens": [1], "logprobs": [-1.0, -1.0]},
}


@pytest.fixture(scope="module")
def server(make_vllm):
    environment = make_vllm(
        ANSWERS, report=[{"layer": "a", "kernel": "dense"}, {"layer": "b", "kernel": "dense"}]
    )
    with serving(environment, MODEL, ["--dtype", "float32"], patience=60) as server:
        yield server, environment / "bin"


def test_a_ready_server_answers_with_tokens_and_their_logarithms(server):
    assert server[0].complete([13], 2) == Completion((8, 9), (-0.25, -1e-9))
    assert server[0].complete((7, 7, 7), 3) == Completion((5, 5, 5), (-0.5, -0.5, -0.5))


def test_the_request_asks_for_greedy_tokens_of_exactly_that_prompt(server):
    server[0].complete([13, 14], 5)
    request = json.loads((server[1] / "request.json").read_text())
    assert request["path"] == "/v1/completions"
    assert request["body"] == {
        "model": server[0].name, "prompt": [13, 14], "max_tokens": 5, "temperature": 0, "logprobs": 1, "ignore_eos": True,
        "return_token_ids": True, "seed": 0, "repetition_penalty": 1.0,
    }  # fmt: skip


def test_the_command_is_vllm_serve_with_the_models_path_on_this_machine_alone(server):
    command = json.loads((server[1] / "argv.json").read_text())
    port = server[0].url.rpartition(":")[2]
    assert command == [
        "serve", str(MODEL.absolute()), "--host", "127.0.0.1", "--port", port, "--served-model-name", server[0].name,
        "--dtype", "float32",
    ]  # fmt: skip


def test_no_two_servers_go_by_one_name(server, environment):
    with serve(environment, "good") as other:
        assert other.name != server[0].name


def test_a_proxy_of_the_environment_is_passed_by(environment, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("server_imported_anew", module.__file__)
    anew = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, anew)
    spec.loader.exec_module(anew)
    with anew.serving(environment, MODEL, patience=10) as server:
        assert server.complete([1], 1).tokens == (5,)


def test_the_plugins_report_is_read_line_by_line(server):
    assert server[0].layers() == [{"layer": "a", "kernel": "dense"}, {"layer": "b", "kernel": "dense"}]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (1, "refused with 400: .*prompt too long"), (2, "refused with 500"), (3, "no answer from the server"),
        (4, "answer lacks"), (5, "answer lacks"), (6, "answer lacks"), (7, "answer lacks 'token_ids'.*hello"),
        (8, "answer lacks"), (9, "answer lacks"), (10, "answered 1 tokens, 2 were asked for"),
        (11, "answered 3 tokens, 2 were asked for"), (12, "answered 2 tokens"),
        (14, "no answer"), (15, "answer lacks"), (16, "answered 1 tokens"),
    ],
)  # fmt: skip
def test_any_other_answer_is_an_error_that_shows_it(prompt, words, server):
    with pytest.raises(ServingError, match=words):
        server[0].complete([prompt], 2)
    assert server[0].process.poll() is None


def test_without_a_report_no_layer_was_reported(environment):
    with serve(environment, "good") as server:
        assert server.layers() == []
        server.report.write_text("{")
        with pytest.raises(ServingError, match="report is not readable"):
            server.layers()


# the end


def test_server_children_and_files_are_gone_at_the_end(make_vllm):
    environment = make_vllm()
    with serve(environment, "family") as server:
        child = int((environment / "bin" / "child").read_text())
        assert running(server.process.pid) and running(child) and server.log.is_file()
    assert is_gone(server.process.pid) and is_gone(child)
    assert not server.log.parent.exists()


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_server_and_children_are_gone_after_an_exception_too(error, make_vllm):
    environment = make_vllm()
    with pytest.raises(type(error)), serve(environment, "family") as server:
        raise error
    assert is_gone(server.process.pid) and is_gone(int((environment / "bin" / "child").read_text()))


def test_a_server_that_ignores_signals_is_killed(environment, monkeypatch):
    wait = subprocess.Popen.wait
    monkeypatch.setattr(  # the pauses between the signals
        subprocess.Popen, "wait", lambda self, timeout=None: wait(self, None if timeout is None else 0.2)
    )
    with serve(environment, "stubborn") as server:
        pass
    assert is_gone(server.process.pid) and server.process.returncode == -9


def test_a_server_that_listens_to_signals_is_asked_and_not_killed(environment):
    with serve(environment, "good") as server:
        pass
    assert server.process.returncode not in (None, -9, -15)


# not ready


def test_one_that_dies_at_the_start_shows_its_first_error_and_its_last_lines(environment):
    with pytest.raises(ServingError) as error, serve(environment, "dies"):
        raise AssertionError("it never was ready")
    assert "ended with exit status 3 (ValueError: no room); its last lines:\n" in error.value.message
    assert error.value.message.endswith("  | line 98\n  | line 99\n  | the reason")
    assert "line 70\n" not in error.value.message  # the last lines, not all


@pytest.mark.parametrize("mode", ["never", "loads", "babbles"])
def test_one_that_does_not_get_ready_is_given_up_shown_and_stopped(mode, make_vllm, monkeypatch):
    started, popen = [], subprocess.Popen

    def remember(*args, **kwargs):
        started.append(popen(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(module.subprocess, "Popen", remember)
    with pytest.raises(ServingError) as error, serve(make_vllm(), mode, patience=2):
        raise AssertionError("it never was ready")
    assert "was not ready after 2 s" in error.value.message
    assert f"  | fake server starts in mode {mode}" in error.value.message
    assert len(started) == 1 and is_gone(started[0].pid)


def test_a_taken_port_is_named_before_anything_is_started(make_vllm):
    environment = make_vllm()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(ServingError, match=f"port {port} cannot be used"),
            serve(environment, "good", port=port),
        ):
            raise AssertionError("it never was ready")
    assert not (environment / "bin" / "argv.json").exists()


def test_a_given_port_is_used(environment):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with serve(environment, "good", port=port) as server:
        assert server.url == f"http://127.0.0.1:{port}" and server.complete([1], 1).tokens == (5,)


def test_an_executable_that_cannot_be_started_is_named(tmp_path):
    program = tmp_path / "vllm"
    program.write_text("#!/nowhere/python\n")  # as in a virtual environment that was moved
    program.chmod(0o755)
    with pytest.raises(ServingError, match="cannot start .*vllm"), serving(tmp_path / "vllm", MODEL):
        raise AssertionError("it never was ready")


# dying later


@pytest.mark.parametrize("mode", ["dies later", "hangs up and dies"])
def test_one_that_dies_in_the_middle_of_a_request_shows_its_last_words(mode, environment):
    with serve(environment, mode) as server, pytest.raises(ServingError) as error:
        server.complete([1], 2)
    assert "ended with exit status 7" in error.value.message and "  | last words" in error.value.message


@pytest.mark.parametrize("mode", ["stops halfway", "babbles later"])
def test_half_an_answer_and_no_http_are_no_answer(mode, environment):
    with serve(environment, mode) as server, pytest.raises(ServingError, match="no answer from the server"):
        server.complete([1], 2)


# where vllm is


def test_vllm_is_found_in_an_environment_or_given_itself(environment):
    assert (
        vllm_executable(environment)
        == vllm_executable(environment / "bin" / "vllm")
        == environment / "bin" / "vllm"
    )


@pytest.mark.parametrize("place", ["nowhere", "empty", "no program", "empty/bin"])
def test_where_no_vllm_is_it_is_said(place, tmp_path):
    (tmp_path / "empty" / "bin").mkdir(parents=True)
    (tmp_path / "no program").write_text("x")
    with pytest.raises(RecipeError, match="there is no vllm executable in") as error:
        vllm_executable(tmp_path / place)
    assert place in error.value.message


def test_a_relative_path_is_made_absolute_also_from_the_home_directory(environment, monkeypatch):
    monkeypatch.chdir(environment)
    assert vllm_executable(Path("bin/vllm")) == environment / "bin" / "vllm"
    monkeypatch.setenv("HOME", str(environment))
    assert vllm_executable(Path("~/bin/vllm")) == environment / "bin" / "vllm"


# transformers' own greedy tokens


def test_greedy_gives_the_tokens_and_logarithms_of_generate(model):
    model.generation_config.eos_token_id = None
    for prompt in ([5], [3, 1, 4, 1, 5, 9, 2, 6]):
        found = greedy(model, prompt, 12)
        own = model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, return_dict_in_generate=True,
            output_logits=True, pad_token_id=0,
        )  # fmt: skip
        assert list(found.tokens) == own.sequences[0, len(prompt) :].tolist()
        expected = [float(step[0].log_softmax(-1).max()) for step in own.logits]
        assert found.logprobs == pytest.approx(expected, abs=1e-5)
        assert len(set(found.logprobs)) > 6


def test_greedy_does_not_stop_at_the_end_of_text(llama):
    first = greedy(llama, [5], 1).tokens[0]
    llama.generation_config.eos_token_id = llama.config.eos_token_id = first
    assert len(greedy(llama, [5], 6).tokens) == 6


def test_the_name_of_the_report_is_the_plugins():
    from msp_plugin.serving.vllm import report

    assert module.REPORT == report.REPORT == "MSP_SERVING_REPORT"
