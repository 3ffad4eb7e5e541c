"""What a rank of the test of tensor parallelism does."""


def answer_with_half_of_every_layer(folder, out):
    """Logits, tokens and the shapes of this rank's weights, left in the folder `out`."""
    import torch
    from transformers.distributed import DistributedConfig

    from hrmtext.hf import HrmTextForCausalLM

    config = DistributedConfig(tp_size=2, tp_plan="auto")
    model = HrmTextForCausalLM.from_pretrained(folder, distributed_config=config).eval()
    ids = torch.arange(4, 14)[None]
    types = (torch.arange(10) < 7).long()[None]
    with torch.no_grad():
        logits = model(ids, token_type_ids=types).logits
    tokens = model.generate(
        ids, token_type_ids=types * 0 + 1, attention_mask=torch.ones_like(ids),
        max_new_tokens=12, do_sample=False,
    )  # fmt: skip
    weights = {
        name: tuple(weight.to_local().shape if hasattr(weight, "to_local") else weight.shape)
        for name, weight in model.named_parameters()
    }
    rank = torch.distributed.get_rank()
    torch.save({"logits": logits, "tokens": tokens, "shapes": weights}, f"{out}/{rank}.pt")
