"""
Our sampler beside the cached `generate` of Hugging Face transformers: the same network and weights (as its Qwen3, which
lacks our additions: 0 in a new network, so the outputs are the same), the same prompts, 8 tries of each. The library is
no requirement of ours (some 3 minutes on 2 cores):

    pip install transformers && python results/beside_transformers.py
"""
import copy
import os
import random
import sys
import time

import torch
import transformers

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import model as network
import train
from eval import STEPS, seconds
from executor import cores
from model import END, PAD, generate


def qwen3_twin(model):
    """The same network and weights as Hugging Face transformers' Qwen3; right to left it is how to load a published
    decoder."""
    c = model.config
    twin = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.n_inner, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, head_dim=c.head_dim, rms_norm_eps=c.norm_eps,
        max_position_embeddings=c.block_size, tie_word_embeddings=False, rope_theta=c.rope_theta)).eval()
    weights = {"model.embed_tokens": model.embed.weight, "model.norm": model.norm.weight, "lm_head": model.head.weight}
    for i, b in enumerate(model.blocks):
        kv = c.n_kv_head * c.head_dim
        q, k, v = b.qkv.weight.split([c.n_head * c.head_dim, kv, kv])
        q, k, q_norm, k_norm = (w.unflatten(0, (-1, c.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)  # its channel
                                for w in (q, k, b.q_norm.weight, b.k_norm.weight))         # pairs: (i, i + hd / 2)
        gate, up = b.gate_up.weight.chunk(2)
        weights.update({f"model.layers.{i}.{name}": w for name, w in {
            "self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v, "self_attn.o_proj": b.proj.weight,
            "self_attn.q_norm": q_norm, "self_attn.k_norm": k_norm, "mlp.gate_proj": gate,
            "mlp.up_proj": up, "mlp.down_proj": b.down.weight, "input_layernorm": b.norm1.weight,
            "post_attention_layernorm": b.norm2.weight}.items()})
    twin.load_state_dict({f"{name}.weight": w.detach().clone() for name, w in weights.items()})
    return twin


def library_rate(model, prompts, longest, least):
    """Tokens/s of the library, replies of `least` to `longest` tokens; in the better of its number types."""
    twin, width, rates = qwen3_twin(model), max(map(len, prompts)), []
    idx = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts]).repeat_interleave(8, 0)  # left-padded
    torch.set_num_threads(cores())
    for dtype in (torch.float32, torch.bfloat16) * 2:
        start = time.perf_counter()
        with torch.inference_mode():
            out = twin.to(dtype).generate(
                idx, attention_mask=idx.ne(PAD).long(), do_sample=True, top_k=0, max_new_tokens=longest,
                min_new_tokens=least, pad_token_id=PAD, eos_token_id=END, bos_token_id=END)
        rates.append(int(out[:, width:].ne(PAD).sum()) / (time.perf_counter() - start))
    return max(rates)


def main():
    network.tune("cpu")
    cfg, _ = train.parse(["--preset", "cpu", "--device", "cpu"])
    torch.manual_seed(0)
    rng, model = random.Random(0), train.new_model(cfg)
    prompts = [[rng.randrange(32, 300) for _ in range(rng.randint(20, 60))] for _ in range(192)]
    ender = copy.deepcopy(model)                # its replies end by themselves, as in self-play:
    with torch.no_grad():                       # a constant channel and its weight: one token in 64 or so is the end
        ender.embed.weight[:, 0], ender.head.weight[END] = 3, 0
        ender.head.weight[END, 0] = 0.17
    lengths = [len(r) for r in generate(ender, prompts, cfg.max_new, tries=8, dtype=cfg.dtype)[0]]
    for what, net, longest, least, tokens in (
            (f"all replies of {STEPS} tokens", model, STEPS, STEPS, 8 * len(prompts) * STEPS),
            (f"of {sum(lengths) / len(lengths):.0f} tokens on average, {max(lengths)} at most", ender, cfg.max_new, 1,
             sum(lengths))):
        ours = tokens / seconds(lambda: generate(net, prompts, longest, tries=8, stop=-1 if least > 1 else END,
                                                 dtype=cfg.dtype))
        theirs = library_rate(net, prompts, longest, least)
        print(f"{what:42}{ours:12,.0f}{theirs:12,.0f} tokens/s{ours / theirs:8.1f}x", flush=True)


if __name__ == "__main__":
    main()
