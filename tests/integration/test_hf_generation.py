"""The documentation's examples and `pipeline` on an exported folder, with the prefix mask."""

import subprocess
import sys

import pytest
import torch
import transformers
from hf_tiny_run import exact_match, largest_miss, reference_logits, words

import hrmtext
import hrmtext.hf as hf
from hrmtext.hf import PrefixLMPipeline, format_prompt

EACH_CLASS = pytest.mark.parametrize(
    "model_class",
    [transformers.AutoModelForCausalLM, hf.HrmTextForCausalLM],
    ids=["transformers", "ours"],
)
FP32, BF16 = 1e-5, 0.03
"""Largest gap to the best logit, as a share of the largest logit, that rounding explains."""


@EACH_CLASS
def test_the_documentation_page_s_example_runs_and_applies_the_mask(exported, model_class):
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    model = model_class.from_pretrained(exported, device_map="auto")
    inputs = tokenizer("The quick brown fox", return_tensors="pt").to(model.device)
    out = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    num_prompt = inputs["input_ids"].shape[1]
    assert 1 <= out.shape[1] - num_prompt <= 16
    assert tokenizer.decode(out[0], skip_special_tokens=True).startswith("The quick brown fox")
    assert largest_miss(exported, out[0].tolist(), num_prompt) <= FP32


@EACH_CLASS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_model_card_s_example_with_a_composite_condition_runs_and_applies_the_mask(
    exported, model_class, dtype
):
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    model = model_class.from_pretrained(exported, dtype=dtype).eval()
    condition = "<|quad_end|><|object_ref_end|>"
    prompt = f"<|im_start|>{condition}Explain why the sky is blue.<|im_end|>"
    assert prompt == format_prompt("Explain why the sky is blue.", "synth,cot")
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    inputs["token_type_ids"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=256, do_sample=False)
    num_prompt = inputs["input_ids"].shape[1]
    assert tokenizer.decode(out[0], skip_special_tokens=False).startswith(prompt)
    slack = FP32 if dtype == torch.float32 else BF16
    assert largest_miss(exported, out[0].tolist(), num_prompt) <= slack


def test_both_examples_run_through_the_automatic_classes_once_ours_are_registered(exported):
    code = f"""
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from hrmtext.hf import register_auto_classes
register_auto_classes()
name = {str(exported)!r}
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, device_map="auto")
assert type(model).__module__ == "hrmtext.hf.modeling", type(model)
inputs = tokenizer("The quick brown fox", return_tensors="pt").to(model.device)
out = model.generate(**inputs, max_new_tokens=16, do_sample=False)
print(tokenizer.decode(out[0], skip_special_tokens=True))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("The quick brown fox")


@EACH_CLASS
@torch.no_grad()
def test_the_tokenizer_s_own_output_is_the_prefix_mask_and_without_it_the_model_is_causal(
    exported, model_class
):
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    model = model_class.from_pretrained(exported)
    inputs = tokenizer(format_prompt("Explain why the sky is blue."), return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    prefix, causal = (reference_logits(exported, ids, n) for n in (len(ids), 0))
    scale = float(prefix.abs().max())
    assert float((model(**inputs).logits[0] - prefix).abs().max()) <= FP32 * scale
    del inputs["token_type_ids"]
    assert float((model(**inputs).logits[0] - causal).abs().max()) <= FP32 * scale
    assert float((prefix - causal)[-1].abs().max()) > 0.05 * scale


@EACH_CLASS
@pytest.mark.parametrize("batch_size", [1, 5])
def test_our_pipeline_answers_as_we_do_batched_with_padding(exported, model_class, batch_size):
    texts = [f"copy {word}" for word in words(seed=0)[:8]] + ["copy a", "copy fedcba", "next abc"]
    expected = hrmtext.load(exported, device="cpu", dtype="fp32").generate(texts, max_new_tokens=8)
    pipe = transformers.pipeline(
        "text-generation",
        model=model_class.from_pretrained(exported),
        tokenizer=transformers.AutoTokenizer.from_pretrained(exported),
        pipeline_class=PrefixLMPipeline,
        batch_size=batch_size,
    )
    prompts = [format_prompt(text) for text in texts]
    found = pipe(prompts, return_full_text=False, max_new_tokens=8)
    assert [answer[0]["generated_text"] for answer in found] == expected
    assert expected[:8] == words(seed=0)[:8]


def test_a_chat_through_our_pipeline_is_one_prompt(exported):
    pipe = transformers.pipeline(
        "text-generation",
        model=hf.HrmTextForCausalLM.from_pretrained(exported),
        tokenizer=transformers.AutoTokenizer.from_pretrained(exported),
        pipeline_class=PrefixLMPipeline,
    )
    found = pipe([{"role": "user", "content": "copy bad"}])
    assert found[0]["generated_text"][-1] == {"role": "assistant", "content": "bad"}


@EACH_CLASS
def test_the_ordinary_pipeline_still_drops_the_mask(exported, model_class):
    """Why there is one of our own; should this fail, transformers has mended it."""
    seen = []
    model = model_class.from_pretrained(exported)
    generate = model.generate
    model.generate = lambda *args, **kwargs: seen.append(kwargs) or generate(*args, **kwargs)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    for pipeline_class in (None, PrefixLMPipeline):
        pipe = transformers.pipeline(
            "text-generation", model=model, tokenizer=tokenizer, pipeline_class=pipeline_class
        )
        pipe(format_prompt("copy abc"), max_new_tokens=2)
    assert "token_type_ids" not in seen[0]
    assert seen[1]["token_type_ids"].tolist() == seen[1]["attention_mask"].tolist()


@EACH_CLASS
def test_the_trained_model_knows_its_task(exported, model_class):
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    model = model_class.from_pretrained(exported)
    rows = [{"instruction": f"copy {w}", "response": w} for w in words(seed=0)]
    assert exact_match(model, tokenizer, rows) >= 0.95
