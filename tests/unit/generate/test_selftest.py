"""The self-test finds every mistake in a path that really makes it, and no fault in a right one."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from generate_helpers import text_model

from hrmtext.artifacts.hf_folder import CONFIG_FILE
from hrmtext.cli.main import main
from hrmtext.convert import export_hf
from hrmtext.data.tokenizer import BEGIN, PROMPT_END
from hrmtext.errors import BackendError, CheckpointError
from hrmtext.generate import TextModel, load
from hrmtext.generate import selftest as tested
from hrmtext.generate.mistakes import mistakes
from hrmtext.generate.selftest import (
    RIGHT,
    UNDECIDED,
    WRONG,
    check_answers,
    check_logits,
)
from hrmtext.generate.selftest_paths import NativePath, ServerPath, TransformersPath

PROMPTS = ("what is seven", "sort the list of numbers 4 1 3", "add 7", "count the letters in red")
LONG = ("please count the letters in the word blue and sort the list of red numbers " * 2,)


def ending(model: TextModel, place: int = 3) -> TextModel:
    """The model with two rows of its head swapped, so that one answer ends at `place`."""
    tokens = model.generate_tokens(PROMPTS[0], stop_tokens=[])[0].tokens
    token = next(t for t in tokens[place:] if t not in tokens[:place])
    weight = model.model.lm_head.weight.data
    pair = [token, model.tokenizer.eos_id]
    weight[pair] = weight[pair[::-1]].clone()
    return model


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    """A third of the usual length: most of the time goes there."""
    monkeypatch.setattr(tested, "MAX_NEW_TOKENS", 10)


@pytest.fixture(scope="module")
def model():
    # Twice the scale of the head: answers of random weights are then less of a toss-up.
    made = text_model(max_seq_len=128, num_layers_per_stack=1)
    made.model.lm_head.weight.data *= 4
    return ending(made)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("selftest") / "hf"
    export_hf(model, path, layout="split")
    return path


@pytest.fixture()
def copy(folder, tmp_path):
    """A copy of the folder to make mistakes in."""
    path = tmp_path / "copy"
    path.mkdir()
    for file in folder.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


def rewrite(path, **changes):
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_native_path_is_right(folder, model, dtype):
    report = check_logits(model, NativePath(load(folder, "cpu", dtype)), PROMPTS)
    assert report.verdict == RIGHT and report.mistake is None, report
    assert "answers end where they must" in report.message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transformers_is_right_with_an_exported_folder(folder, model, dtype):
    report = check_logits(model, TransformersPath(folder, dtype), PROMPTS)
    assert report.verdict == RIGHT, report
    assert report.distances["right"] < 0.05 < report.distances["causal instead of prefix"]


def test_transformers_without_token_type_ids_is_causal(copy, model):
    rewrite(copy / "tokenizer_config.json", model_input_names=["input_ids", "attention_mask"])
    report = check_logits(model, TransformersPath(copy), PROMPTS)
    assert (report.verdict, report.mistake) == (WRONG, "causal instead of prefix")
    assert "token_type_ids" in report.message
    assert report.distances["causal instead of prefix"] < 1e-5 < report.distances["right"]


@pytest.mark.parametrize(
    ("changes", "mistake"),
    [
        ({"embedding_scale": 1.0}, "embedding scale 1 instead of 5.65685"),
        ({"embedding_scale": None, "initializer_range": 0.02}, "embedding scale 50 instead"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope theta 500000"),
        ({"H_cycles": 1, "num_hidden_layers": 4}, "1 x 3 cycles instead of 2 x 3"),
        ({"L_cycles": 2, "num_hidden_layers": 6}, "2 x 2 cycles instead of 2 x 3"),
    ],
)
def test_a_wrong_config_is_named(copy, model, changes, mistake):
    rewrite(copy / CONFIG_FILE, **changes)
    prompts = (*PROMPTS, *LONG)
    report = check_logits(model, TransformersPath(copy), prompts)
    assert report.verdict == WRONG and report.mistake.startswith(mistake), report
    ours = NativePath(load(copy, "cpu", "fp32"))
    assert check_logits(model, ours, prompts).mistake == report.mistake


def constant_gate(name, tensor):
    return torch.zeros_like(tensor) if "self_attn.gate_proj" in name else tensor


def no_gate(name, tensor):
    return tensor * 2 if "self_attn.o_proj" in name else constant_gate(name, tensor)


def zero_start(name, tensor):
    return torch.zeros_like(tensor) if "z_L_init" in name else tensor


def swapped_stacks(name, tensor):
    return None


@pytest.mark.parametrize(
    ("change", "mistake"),
    [
        (constant_gate, "a constant gate"),
        (no_gate, "attention without its gate"),
        (zero_start, "z_L started at zero"),
        (swapped_stacks, "the H and the L stack swapped"),
    ],
)
def test_wrong_weights_are_named(copy, model, change, mistake):
    path = TransformersPath(copy)
    with torch.no_grad():
        if change is swapped_stacks:
            inner = path.model.model
            for a, b in zip(inner.H_module.parameters(), inner.L_module.parameters(), strict=True):
                a.data, b.data = b.data, a.data
        else:
            for name, tensor in [*path.model.named_parameters(), *path.model.named_buffers()]:
                tensor.data.copy_(change(name, tensor))
    report = check_logits(model, path, PROMPTS)
    assert (report.verdict, report.mistake) == (WRONG, mistake), report


def test_another_pairing_of_rotary_dimensions_is_named(copy, model, monkeypatch):
    from transformers.models.hrm_text import modeling_hrm_text as theirs

    def neighbours(q, k, cos, sin, **_):
        def turn(x):
            half = x.shape[-1] // 2
            c, s = (t[..., :half].unsqueeze(1) for t in (cos, sin))
            even, odd = x[..., 0::2], x[..., 1::2]
            return torch.stack((even * c - odd * s, even * s + odd * c), dim=-1).flatten(-2)

        return turn(q), turn(k)

    monkeypatch.setattr(theirs, "apply_rotary_pos_emb", neighbours)
    report = check_logits(model, TransformersPath(copy), PROMPTS)
    assert report.mistake == "neighbouring dimensions turned together", report


@pytest.mark.parametrize(("shift", "mistake"), [(None, "runs past the end"), (1, "stops early")])
def test_a_wrong_end_token_is_named(copy, model, shift, mistake):
    answer = model.generate_tokens(PROMPTS[0])[0]
    assert answer.finish_reason == "stop"
    wrong = 2 if shift is None else answer.tokens[shift]
    rewrite(copy / "generation_config.json", eos_token_id=wrong)
    report = check_logits(model, TransformersPath(copy), PROMPTS)
    assert report.verdict == WRONG and mistake in report.mistake, report


def test_an_unknown_mistake_is_not_given_a_known_name(copy, model):
    path = TransformersPath(copy)
    with torch.no_grad():
        path.model.lm_head.weight.copy_(path.model.lm_head.weight.flip(0))
    report = check_logits(model, path, PROMPTS)
    assert report.verdict == WRONG
    assert report.mistake is None or report.distances[report.mistake] > 0.5, report


def test_not_a_number_is_wrong(copy, model):
    path = TransformersPath(copy)
    path.model.lm_head.weight.data[3] = float("nan")
    report = check_logits(model, path, PROMPTS)
    assert report.verdict == WRONG and "not all finite" in report.message


def test_another_tokenizer_is_refused(copy, model):
    fields = json.loads((copy / "tokenizer.json").read_text())
    fields["model"]["merges"] = fields["model"]["merges"][:2]
    (copy / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="as other tokens"):
        check_logits(model, TransformersPath(copy), PROMPTS)


def test_a_model_blind_to_the_mask_is_undecided(model):
    """Without values attention adds nothing, so that no mask can matter."""
    blind = text_model()
    for name, tensor in blind.model.state_dict().items():
        if name.endswith("gqkv_proj.weight"):
            tensor.chunk(4)[3].zero_()
    assert check_logits(blind, NativePath(blind), PROMPTS).verdict == UNDECIDED


def test_a_causal_model_is_right_causally():
    model = text_model(prefix_lm=False)
    assert check_logits(model, NativePath(model), PROMPTS).verdict == RIGHT
    prefix = text_model(prefix_lm=True)
    assert check_logits(model, NativePath(prefix), PROMPTS).mistake == "prefix instead of causal"


def test_every_mistake_changes_the_logits(model):
    rows = [(ids, [20, 30]) for ids in model.tokenizer.encode_prompts([*PROMPTS, *LONG])]
    right = tested.reference_logits(model.model, rows)
    names = set()
    for mistake in mistakes(model.config):
        names.add(mistake.name)
        wrong = tested.reference_logits(mistake.variant(model.model), rows)
        assert tested.Distance.between(right, wrong).relative > 5e-3, mistake.name
    assert len(names) >= 15
    assert torch.equal(tested.reference_logits(model.model, rows), right)


class Handler(BaseHTTPRequestHandler):
    """OpenAI's completions, as much of it as the test asks, by a real model."""

    def log_message(self, *_):
        pass

    def reply(self, value, status=200):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.reply({"data": [{"id": "tested"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        model, with_logprobs, stop = self.server.state
        if model is None:
            return self.reply({"error": "no model"}, 503)
        text = body["prompt"].removeprefix(BEGIN + "<|object_ref_start|>").removesuffix(PROMPT_END)
        config = tested.GenerateConfig(max_new_tokens=body["max_tokens"])
        answer = model.generate_tokens(text, config=config, stop_tokens=stop)[0]
        decode = model.tokenizer.tokenizer.decode
        logprobs = {
            "tokens": [decode([t], skip_special_tokens=False) for t in answer.tokens],
            "token_logprobs": answer.logprobs,
        }
        choice = {"text": answer.text, "finish_reason": answer.finish_reason}
        return self.reply({"choices": [choice | {"logprobs": logprobs if with_logprobs else None}]})


@pytest.fixture(scope="module")
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        found.url = f"http://127.0.0.1:{found.server_address[1]}"
        yield found
        found.shutdown()
        thread.join()


def variant(model, name):
    mistake = next(m for m in mistakes(model.config) if m.name.startswith(name))
    return TextModel(mistake.variant(model.model), model.tokenizer)


@pytest.mark.parametrize("with_logprobs", [True, False])
def test_a_right_server_is_right(server, model, with_logprobs):
    server.state = (model, with_logprobs, None)
    report = check_answers(model, ServerPath(server.url), PROMPTS)
    assert report.verdict == RIGHT, report
    assert ServerPath(server.url + "/v1/").url == server.url + "/v1"


@pytest.mark.parametrize("with_logprobs", [True, False])
@pytest.mark.parametrize(
    "name", ["causal", "embedding scale 1 ", "attention without", "1 x 3", "the H and the L"]
)
def test_a_wrong_servers_mistake_is_named(server, model, with_logprobs, name):
    server.state = (variant(model, name), with_logprobs, None)
    report = check_answers(model, ServerPath(server.url), PROMPTS)
    assert report.verdict == WRONG and report.mistake.startswith(name), report


@pytest.mark.parametrize("early", [False, True])
def test_a_servers_wrong_end_token_is_named(server, model, early):
    stop = [model.generate_tokens(PROMPTS[0])[0].tokens[1]] if early else []
    server.state = (model, False, stop)
    report = check_answers(model, ServerPath(server.url), PROMPTS)
    assert report.verdict == WRONG, report
    assert ("stops early" if early else "runs past the end") in report.mistake


def test_a_bf16_server_is_right_though_thin_margins_flip(server, model, folder):
    server.state = (load(folder, "cpu", torch.bfloat16), True, None)
    assert check_answers(model, ServerPath(server.url), PROMPTS).verdict == RIGHT


def test_a_server_that_fails_says_how(server, model):
    server.state = (None, False, None)
    with pytest.raises(BackendError, match=r"answered 503: .*no model"):
        check_answers(model, ServerPath(server.url), PROMPTS)
    with pytest.raises(BackendError, match=r"cannot ask http://127\.0\.0\.1:1/v1/models"):
        ServerPath("http://127.0.0.1:1")


def test_the_command_says_what_it_sees_and_exits_accordingly(
    server, model, folder, copy, capsys, tmp_path
):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    asked = ["--prompts", str(prompts)]
    assert main(["selftest", str(folder), *asked]) == 0
    assert "native (float32 on cpu): right." in capsys.readouterr().out
    assert main(["selftest", str(folder), "--engine", "transformers", *asked]) == 0
    rewrite(copy / CONFIG_FILE, embedding_scale=1.0)
    against = ["--reference", str(folder), *asked]
    assert main(["selftest", str(copy), "--engine", "transformers", *against]) == 1
    assert "wrong. embedding scale 1 instead of 5.65685" in capsys.readouterr().out
    server.state = (variant(model, "causal"), False, None)
    assert main(["selftest", str(folder), "--url", server.url, "--json", *asked]) == 1
    assert json.loads(capsys.readouterr().out)["mistake"] == "causal instead of prefix"
    assert main(["selftest", str(folder), "--prompts", str(tmp_path / "none")]) == 2
    assert "cannot read prompts" in capsys.readouterr().err
