"""Served models, against a real HTTP server on this machine that misbehaves on demand."""

from __future__ import annotations

import base64
import http.server
import io
import json
import logging
import math
import pickle
import threading
import time

import pytest
import torch
from PIL import Image

from coz.critics.base import Critic
from coz.critics.server import ServedCritic
from coz.errors import UserError
from coz.models.chat import PAIR_QUESTION
from coz.models.decoding import Sampling
from coz.models.served import ChatServer, ServerError
from coz.prompters.base import Prompter
from coz.prompters.server import ServedPrompter

KEY = "sk-very-secret"
QUICK = {"model": "m", "timeout_s": 2.0, "retries": 3, "backoff_s": 0.01}


class Endpoint:
    """An OpenAI-compatible server. `script` holds what to do with the next chat requests; afterwards all is well."""

    def __init__(self):
        self.script: list[str] = []
        self.requests: list[dict] = []
        self.headers: list[dict] = []
        self.live = self.peak = 0
        self.delay_s = 0.0
        self.text = "fur, bark"
        self.logprobs = None
        self.lock = threading.Lock()
        endpoint = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                self.send(404 if endpoint.script == ["no list"] else 200, {"data": [{"id": "m"}]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with endpoint.lock:
                    endpoint.requests.append(body)
                    endpoint.headers.append(dict(self.headers))
                    endpoint.live += 1
                    endpoint.peak = max(endpoint.peak, endpoint.live)
                    act = endpoint.script.pop(0) if endpoint.script else "well"
                try:
                    self.act(act)
                except (BrokenPipeError, ConnectionResetError):
                    pass
                finally:
                    with endpoint.lock:
                        endpoint.live -= 1

            def act(self, act):
                time.sleep(endpoint.delay_s)
                choice = {"message": {"content": endpoint.text}}
                if endpoint.logprobs is not None:
                    choice["logprobs"] = {"content": endpoint.logprobs}
                if act == "hang":
                    time.sleep(1.5)
                    self.close_connection = True
                elif act == "die":  # promises more than it sends
                    self.send_response(200)
                    self.send_header("content-length", "1000")
                    self.end_headers()
                    self.wfile.write(b'{"choices": [')
                    self.close_connection = True
                elif act == "nonsense":
                    self.send(200, b"<html>oops</html>")
                elif act == "empty":
                    self.send(200, {"choices": []})
                elif act.isdigit():
                    self.send(int(act), {"error": f"bad, key {KEY}"})
                else:
                    self.send(200, {"choices": [choice]})

            def send(self, status, content):
                content = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture
def endpoint():
    it = Endpoint()
    yield it
    it.server.shutdown()
    it.server.server_close()


@pytest.fixture(scope="module")
def states():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(4, 3, 8, 8, generator=generator), torch.rand(4, 3, 8, 8, generator=generator)


def _prompter(endpoint, **settings):
    return ServedPrompter(**({"base_url": endpoint.url} | QUICK | settings))


def test_it_sends_question_and_pictures_losslessly(endpoint, states):
    prompter = _prompter(endpoint)
    assert isinstance(prompter, Prompter)
    assert prompter(states[0][:1], states[1][:1]) == ["fur, bark"]
    (body,) = endpoint.requests
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("m", 128, 0.0)
    assert "seed" not in body
    system, user = body["messages"]
    assert system == {"role": "system", "content": PAIR_QUESTION}
    sent = [_picture(part) for part in user["content"]]
    for picture, state in zip(sent, (states[1][0], states[0][0]), strict=True):  # context first
        expected = (state * 255).round().to(torch.uint8).permute(1, 2, 0)
        assert torch.equal(torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(8, 8, 3), expected)


def _picture(part):
    head, data = part["image_url"]["url"].split(",")
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


@pytest.mark.parametrize(
    "script", [["500", "500"], ["429"], ["nonsense"], ["empty"], ["die"], ["hang"], ["503", "die", "nonsense"]]
)
def test_it_survives_what_passes(endpoint, states, script):
    endpoint.script = list(script)
    timeout_s = 0.5 if "hang" in script else 5.0
    assert _prompter(endpoint, timeout_s=timeout_s)(states[0][:1], states[1][:1]) == ["fur, bark"]
    assert len(endpoint.requests) == len(script) + 1


@pytest.mark.parametrize(
    ("act", "said"),
    [("500", "500"), ("nonsense", "no chat completion"), ("die", "connection failed"), ("hang", "timeout_s=0.3")],
)
def test_it_stops_with_the_url_and_the_reason(endpoint, states, act, said):
    endpoint.script = [act] * 2
    with pytest.raises(ServerError, match=said) as caught:
        _prompter(endpoint, retries=1, timeout_s=0.3 if act == "hang" else 5.0)(states[0][:1], states[1][:1])
    assert f"{endpoint.url}/chat/completions" in str(caught.value)
    assert isinstance(caught.value, UserError)


def test_a_refusal_is_not_tried_again(endpoint, states):
    endpoint.script = ["401"]
    with pytest.raises(ServerError, match=r"401.*OPENAI_API_KEY"):
        _prompter(endpoint)(states[0][:1], states[1][:1])
    assert len(endpoint.requests) == 1


def test_a_dead_server_is_named_at_load(states):
    prompter = ServedPrompter(base_url="http://127.0.0.1:9/v1", **QUICK)
    with pytest.raises(ServerError, match=r"127\.0\.0\.1:9/v1/models.*connection failed"):
        prompter.load()


def test_load_knows_the_models(endpoint):
    _prompter(endpoint).load()
    with pytest.raises(ServerError, match="does not serve model=other; it serves m"):
        _prompter(endpoint, model="other").load()
    endpoint.script = ["no list"]
    _prompter(endpoint, model="other").load()


def test_a_run_that_died_in_the_middle_resumes(endpoint, states, tmp_path):
    endpoint.script = ["well", "well", "500", "500"]
    stopped = _prompter(endpoint, retries=1, concurrency=1, cache_dir=str(tmp_path))
    with pytest.raises(ServerError, match="failed 2 times"):
        stopped(*states)
    assert len(endpoint.requests) == 4  # two answered, one tried twice, the last not tried
    assert _prompter(endpoint, cache_dir=str(tmp_path))(*states) == ["fur, bark"] * 4
    assert len(endpoint.requests) == 6  # only the two that were missing


def test_concurrency_is_used_and_limited(endpoint, states):
    endpoint.delay_s = 0.1
    current, context = (state.repeat(2, 1, 1, 1) for state in states)
    current = (current + torch.arange(8).view(8, 1, 1, 1) / 16) % 1
    _prompter(endpoint, concurrency=3)(current, context)
    assert endpoint.peak == 3
    assert len(endpoint.requests) == 8


async def _inside_a_loop(prompter, states):
    return prompter(states[0][:1], states[1][:1])


def test_it_works_where_an_event_loop_runs(endpoint, states):
    import asyncio

    assert asyncio.run(_inside_a_loop(_prompter(endpoint), states)) == ["fur, bark"]


def test_drawing_sends_each_images_seed(endpoint, states):
    prompter = _prompter(endpoint, temperature=0.7, top_p=0.9, concurrency=1)
    prompter(states[0][:2], states[1][:2], seeds=[5, 6])
    assert [(body["seed"], body["temperature"], body["top_p"]) for body in endpoint.requests] == [(5, 0.7, 0.9), (6, 0.7, 0.9)]


def test_the_key_is_sent_and_shown_nowhere(endpoint, states, monkeypatch, caplog):
    monkeypatch.setenv("MY_KEY", KEY)
    prompter = _prompter(endpoint, api_key_env="MY_KEY")
    endpoint.script = ["500"]
    with caplog.at_level(logging.DEBUG):
        prompter(states[0][:1], states[1][:1])
        endpoint.script = ["400"]
        with pytest.raises(ServerError) as caught:
            prompter(states[0][1:2], states[1][1:2])
    assert endpoint.headers[0]["Authorization"] == f"Bearer {KEY}"
    server = prompter._server
    shown = [str(caught.value), repr(server), json.dumps(prompter.fingerprint), str(pickle.dumps(prompter)), caplog.text]
    assert not any(KEY in text for text in shown)
    assert "***" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"base_url": "localhost:8000"}, "not a URL"),
        ({"base_url": "http://user:pw@host/v1"}, "environment variable"),
        ({"base_url": "http://host/v1?key=pw"}, "environment variable"),
        ({"model": ""}, "model is empty"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"retries": -1}, "retries=-1"),
    ],
)
def test_wrong_settings_are_named_without_secrets(settings, said):
    with pytest.raises(UserError, match=said) as caught:
        ChatServer(**({"base_url": "http://host/v1", "model": "m"} | settings))
    assert "pw" not in str(caught.value)


def test_identity_outlives_an_address(endpoint):
    named = [ServedPrompter(base_url=f"http://host{i}/v1", model="m", identity="qwen@abc").fingerprint for i in (1, 2)]
    unnamed = [ServedPrompter(base_url=f"http://host{i}/v1", model="m").fingerprint for i in (1, 2)]
    assert named[0] == named[1]
    assert unnamed[0] != unnamed[1]


# ---------------------------------------------------------------------------------------------------------------------
# critic

PAIR = (Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue"))


def _critic(endpoint, **settings):
    return ServedCritic(**({"base_url": endpoint.url} | QUICK | settings))


def test_critic_asks_the_papers_question(endpoint):
    endpoint.text = "85"
    critic = pickle.loads(pickle.dumps(_critic(endpoint)))
    assert isinstance(critic, Critic)
    assert critic([PAIR], ["fur"]) == [0.85]
    ((message,),) = [body["messages"] for body in endpoint.requests]
    texts = [part["text"] for part in message["content"] if part["type"] == "text"]
    assert texts[:2] == ["First Image: ", "\nSecond Image: "]
    assert texts[2].endswith("Description: fur\nRating (0-100):")
    assert [_picture(part).getpixel((0, 0)) for part in message["content"] if part["type"] == "image_url"] == [
        (255, 0, 0),
        (0, 0, 255),
    ]


def test_critic_counts_what_is_no_score(endpoint):
    critic = _critic(endpoint)
    endpoint.text = "I cannot rate this."
    assert critic([PAIR] * 2, ["a", "b"]) == [None, None]
    assert (critic.tally.asked, critic.tally.failed) == (2, 2)


def _token(**probabilities):
    top = [{"token": token, "logprob": math.log(p)} for token, p in probabilities.items()]
    return top[0] | {"top_logprobs": top}


def test_critic_expects_over_whole_numbers(endpoint):
    endpoint.logprobs = [_token(**{"85": 0.5, " 80": 0.3, "The": 0.2}), _token(**{"<|im_end|>": 0.9})]
    critic = _critic(endpoint, score="expected")
    assert critic([PAIR], ["fur"]) == [pytest.approx((0.5 * 85 + 0.3 * 80) / 0.8 / 100)]
    assert endpoint.requests[0]["top_logprobs"] == 20
    endpoint.logprobs = [_token(The=0.9999, **{"85": 0.0001})]
    assert critic([PAIR], ["fur"]) == [None]
    assert critic.tally.failed == 1


def test_critic_refuses_to_expect_over_digits(endpoint):
    endpoint.logprobs = [_token(**{"8": 0.9}), _token(**{"5": 0.9})]
    with pytest.raises(UserError, match=r"digit by digit.*score=parse"):
        _critic(endpoint, score="expected")([PAIR], ["fur"])
    endpoint.logprobs = None
    with pytest.raises(UserError, match="no log-probabilities"):
        _critic(endpoint, score="expected")([PAIR], ["fur"])


def test_critic_stops_when_the_server_is_gone(endpoint):
    endpoint.script = ["500"] * 2
    critic = _critic(endpoint, retries=1)
    with pytest.raises(ServerError, match=r"chat/completions failed 2 times"):
        critic([PAIR], ["fur"])
    assert critic.tally.asked == 0


def test_pictures_without_a_request_cost_nothing(endpoint):
    assert _prompter(endpoint)._server.ask([], sampling=Sampling()) == []
