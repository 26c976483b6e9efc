"""
model.py: the network, its tokenizer and its sampler (the policy pi of paper section 3.1; arXiv 2505.03335).

One decoder-only transformer plays both roles, so everything here is ordinary: tokens in, next-token log-probs out.
What is worth reading is the sampler. Each rollout carries about one bit of reward, so rollouts a second ARE the
learning speed, and a third of a step is spent here. Beside each fast path stands the slow, obvious one:
`generate_naive` is the specification of `generate` in a dozen lines, and a test ties them token for token.

Where we differ from the paper and from the authors' code (Qwen2.5 weights, vLLM, flash-attention):
1) The network is tiny and starts from random weights; train.py warms it up on generated programs (its "pretraining").
   The block is the one of published decoders (RMSNorm, rotary positions, grouped keys, QK norm, gated MLP, as in
   Qwen3), with head_dim and the MLP width as separate fields, so that such weights could be loaded by renaming, joining
   and, for the rotary pairs, reordering (qwen3_twin in results/beside_transformers.py).
2) The vocabulary is ours: 256 bytes, then Python pieces, then role tokens. tiktoken does the splitting, nothing is
   downloaded. With 50k tokens the head and the embedding would be 29 times larger than all layers together.
3) Two additions, both without effect at first: `values` are value embeddings (after two minutes of warm-up worth .03 to
   .05 nats, at no cost in time), `sharpness` scales the logits (what RL would change first).
4) Log-probs are returned by the sampler itself and equal those of the training forward (1e-3 in the tests), so that the
   first update's ratio is 1 (between vLLM and a trainer it is not, and needs correcting).

Try:  python model.py          # fast and naive sampling: same tokens, both speeds
"""
import copy
import ctypes
import math
import os
import re
import time
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace

import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F

from executor import cores

# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer: ids 0-255 are the bytes, then PIECES, then SPECIAL. Longest piece first; no merges need training, because
# tiktoken turns a regex match that is in the ranks into one token. No piece holds two digits, so numbers are
# spelled the way arithmetic is done.

PIECES = [
    # program frame and lines; the newline with its indentation is part of the piece, so a line starts with one token
    "def f(x):", "def f(", "\n    return x", "\n    return ", "\n    x = ", "\n    y = ", "\n    ", "\n        ",
    "\n        x = ", "\n        y = ", "\n    for v in x:", "\n    for ", "\n    if ", "\n        if ", "\n    else:",
    "\n    elif ", "\n    while ", "\n            ", "  # ", "  # from ", "    ",
    # operators and brackets
    " + ", " - ", " * ", " // ", " % ", " == ", " != ", " > ", " < ", " >= ", " <= ", " = ", " += ", " -= ",
    ", ", ": ", "''", "[]", "()", "'.join(", "): ",
    # expressions over x and over an element
    "x[::-1]", "x[1:]", "x[:-1]", "x[:", "x[", ":]", "x[0]", "x[-1]", "x + x", "x + ", "x - ", "x * ", "x // ", "x % ",
    "sorted(x)", "sorted(", "sum(x)", "len(x)", "max(x)", "min(x)", "abs(x)", "set(", "list(", "str(x)", "str(",
    "int(", "len(", "sum(", "max(", "min(", "range(", "range(x)", "abs(", "reversed(", "reverse=True)", "enumerate(",
    "[v", " for v in x", " for v in ", " if v", "v + ", "v - ", "v * ", "v % ", "v // ", " if x", " if ", " else ",
    " else x", "x == ", "x > ", "x < ", " in x", " not in ", " in ", " and ", " or ", "not ",
    "x.upper()", "x.lower()", "x.swapcase()", "x.title()", "x.replace(", "x.count(", "x.index(", "x.find(", "x.strip(",
    "x.split(", ".append(", ".count(", ".replace(", ".upper()", ".lower()", ".join(", ".split(", "None", "True",
    "False", "return ", "lambda ", "import ", "while ", "for ", "if ",
    # the grammar's frequent half-lines and the elements of lists, each one token: a third fewer tokens a rollout
    "[v + ", "[v - ", "[v * ", "[v % ", " for v in x]", "[v for v in x if v > ", "x[1:] if len(x) > ",
    "x.upper() if len(x) > ", " else x + [", " else x + '", " else x + ", " else x - ", "x + '", "' + x", "x + [",
    "] + x", "x.replace('", "', '", "x.count('", "')", "[x, x + ", " if x > ",
    *(start + digit for start in (", ", "[") for digit in "0123456789"),
    # words of the message channel (selfplay.py); a word and the space before it are one token
    " reverse", " add", " sub", " mul", " mod", " div", " sort", " drop", " keep", " map", " filter", " sum", " len",
    " max", " min", " first", " last", " append", " prepend", " double", " upper", " lower", " swap", " replace",
    " count", " repeat", " if", " loop", " range", " pair", " abs", " str", " int", " list",
]
KINDS = ("deduction", "abduction", "induction")          # of tasks, see selfplay.py
SPECIAL = ["<|pad|>", "<|end|>", *(f"<|{role}_{kind}|>" for role in ("propose", "solve") for kind in KINDS),
           "<|program|>", "<|input|>", "<|output|>", "<|message|>", "<|think|>", "<|try|>", "<|right|>", "<|wrong|>",
           "<|answer|>"]


def _tokenizer():
    ranks = {bytes([i]): i for i in range(256)}
    ranks.update({p.encode(): 256 + i for i, p in enumerate(PIECES)})
    special = {s: len(ranks) + i for i, s in enumerate(SPECIAL)}
    # (?s:.) takes any other character; outside the ranks tiktoken falls back to its bytes
    pattern = "|".join(re.escape(p) for p in sorted(PIECES, key=len, reverse=True)) + r"|(?s:.)"
    return tiktoken.Encoding("nanoazr", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special), special


TOKENIZER, ID = _tokenizer()  # ID["<|end|>"] -> token id
VOCAB_SIZE = TOKENIZER.n_vocab
PAD, END = ID["<|pad|>"], ID["<|end|>"]  # two, because the end token is learnt and padding is not
# on Hopper torch prefers cuDNN's attention, which builds a plan for each new shape (we have hundreds, up to a second
# each) and whose backward pass with a mask had a NaN bug (pytorch issue 196678): flash and memory-efficient serve us
torch.backends.cuda.enable_cudnn_sdp(False)

_encode = lru_cache(maxsize=200_000)(TOKENIZER.encode_ordinary)  # its lists are shared: encode gives copies


def encode(text):
    """Text -> list of ids. Role tokens written out in the text stay plain characters: only our own code may place
    them, else a proposed program could forge the end of a prompt. A lone surrogate becomes U+FFFD."""
    return list(_encode(text))


def decode(ids):
    """List of ids -> text; role tokens are shown by name, bytes that are not UTF-8 as the replacement character."""
    return TOKENIZER.decode([int(i) for i in ids], errors="replace")


# ---------------------------------------------------------------------------------------------------------------------
# The transformer


@dataclass
class GPTConfig:
    vocab_size: int = VOCAB_SIZE
    block_size: int = 368      # longest sequence, prompt + reply, in tokens
    n_layer: int = 2
    n_head: int = 5
    n_embd: int = 160          # d: width of the residual stream
    n_kv_head: int = 1         # n_head / n_kv_head query heads share keys and values: a smaller cache decodes faster
    head_dim: int = 0          # 0: n_embd // n_head
    n_inner: int = 0           # width of the gated MLP; 0: 8/3 of n_embd, rounded up to a multiple of 32
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6

    def __post_init__(self):
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.n_inner = self.n_inner or -(-self.n_embd * 8 // 3 // 32) * 32
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "n_kv_head", "head_dim", "n_inner"):
            assert getattr(self, name) > 0, f"GPTConfig.{name} must be positive, not {getattr(self, name)}"
        assert self.n_head % self.n_kv_head == 0, "n_head must be a multiple of n_kv_head"
        assert self.head_dim % 2 == 0, "head_dim must be even: rotary positions turn pairs of channels"


class RMSNormGrad(torch.autograd.Function):
    """n * w, where n = x * r and r = (mean(x ** 2) + eps) ** -.5 of a row. With g the gradient of n, that of x is
    r * (g - n * mean(g * n)). On a CPU torch has no kernel for it, and autograd would go back through seven operations
    (an update takes 1.1 to 1.2 times as long)."""

    @staticmethod
    def forward(ctx, x, w, eps):
        r = (torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1] + eps).rsqrt()
        n = x * r
        ctx.save_for_backward(n, r, w)
        return n * w

    @staticmethod
    def backward(ctx, grad):
        n, r, w = ctx.saved_tensors
        dot = grad * n
        dx = torch.addcmul(grad * w, n, (dot @ w)[..., None], value=-1 / n.shape[-1]) * r
        return dx, dot.flatten(0, -2).sum(0), None


class RMSNorm(nn.RMSNorm):
    """torch's, always in float32."""

    def forward(self, x):
        if torch.is_grad_enabled() and not x.is_cuda:
            return RMSNormGrad.apply(x.float(), self.weight, self.eps)
        return F.rms_norm(x.float(), self.normalized_shape, self.weight, self.eps)


def rotate(x, turn):
    """Rotary positions: channels (2i, 2i + 1) of x (..., hd) are a complex number, turned by an angle that grows with
    the position. turn (..., hd / 2), complex. (Qwen3 pairs i with i + hd / 2: the same in another order.)"""
    return torch.view_as_real(torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * turn).flatten(-2)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.norm1 = RMSNorm(c.n_embd, c.norm_eps)
        self.qkv = nn.Linear(c.n_embd, (c.n_head + 2 * c.n_kv_head) * c.head_dim, bias=False)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps)  # these two steady the logits at the high learning rates that a
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps)  # small model wants
        self.proj = nn.Linear(c.n_head * c.head_dim, c.n_embd, bias=False)
        self.norm2 = RMSNorm(c.n_embd, c.norm_eps)
        self.gate_up = nn.Linear(c.n_embd, 2 * c.n_inner, bias=False)
        self.down = nn.Linear(c.n_inner, c.n_embd, bias=False)

    def heads(self, x, turn, more):
        """x (B, T, C) -> q (B, KV, G, T, hd), k (B, KV, T, hd), v (B, KV, T, hd), where G = n_head / n_kv_head. more
        (B, T, KV, hd) is added to the values."""
        c, (B, T, _) = self.c, x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, -1, c.head_dim).split([c.n_head, c.n_kv_head, c.n_kv_head], 2)
        v = v + more.to(v.dtype)
        qk = rotate(torch.cat([self.q_norm(q), self.k_norm(k)], 2), turn)
        q, k = qk.split([c.n_head, c.n_kv_head], 2)
        q = q.to(v.dtype).view(B, T, c.n_kv_head, -1, c.head_dim).permute(0, 2, 3, 1, 4)
        k = (k * c.head_dim ** -0.5).to(v.dtype)      # attention's scale: once a key is cheaper than once a score
        return q, k.transpose(1, 2), v.transpose(1, 2)

    def attend(self, q, k, v, bias):
        """Attention written out: at these widths two batched products beat scaled_dot_product_attention on a CPU.
        q (B, KV, G, T, hd), k and v (B, KV, S, hd), bias (..., T, S) holds 0 or -inf; returns (B, T, n_head * hd)."""
        B, KV, G, T, hd = q.shape
        if q.is_cuda and T > 1:
            return self.attend_fused(q, k, v, bias)
        att = torch.bmm(q.reshape(B * KV, G * T, hd), k.reshape(B * KV, -1, hd).transpose(1, 2))
        att = att.view(B, KV, G, T, -1).float().add_(bias).softmax(-1).to(v.dtype).view(B * KV, G * T, -1)
        y = torch.bmm(att, v.reshape(B * KV, -1, hd)).view(B, KV, G, T, hd)
        return y.permute(0, 3, 1, 2, 4).reshape(B, T, -1)

    def attend_fused(self, q, k, v, bias):
        """The same in one kernel: on a GPU the (T, S) scores would cost more memory traffic than all matrices. A bias
        of two dimensions is the plain causal one."""
        B, KV, G, T, hd = q.shape
        k, v = (z[:, :, None].expand(-1, -1, G, -1, -1).reshape(B, KV * G, -1, hd) for z in (k, v))
        plain = bias.dim() == 2
        y = F.scaled_dot_product_attention(q.reshape(B, KV * G, T, hd), k, v, None if plain else bias[:, 0].to(q.dtype),
                                           is_causal=plain, scale=1.0)
        return y.transpose(1, 2).reshape(B, T, -1)

    def finish(self, x, y):
        """Add the attention output y and the gated MLP to the residual stream x."""
        x = x + self.proj(y)
        y = self.norm2(x)
        if x.is_cuda:                                  # one launch
            gate, up = self.gate_up(y).chunk(2, -1)
        else:                                          # halves of one product would not be contiguous, and slower
            gate, up = (F.linear(y, w) for w in self.gate_up.weight.chunk(2))
        return x + self.down(F.silu(gate) * up)


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.embed = nn.Embedding(c.vocab_size, c.n_embd)
        # value embeddings: what a token, and the one before it, add to each layer's values, whatever the layer's input.
        # A look-up costs next to nothing, and no layer need carry tokens along to say which they were. At 0 this is a
        # plain decoder
        self.values, self.values_before = (
            nn.Embedding(c.vocab_size, c.n_layer * c.n_kv_head * c.head_dim) for _ in range(2))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm = RMSNorm(c.n_embd, c.norm_eps)
        self.head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        # logits are multiplied by exp(sharpness): one number for how far to trust one's first choice. It is the first
        # thing RL finds out; spread over the head it would cost noise in thousands of entries (Config.sharp_lr)
        self.sharpness = nn.Parameter(torch.zeros(1))
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02 if "embed" in name else c.n_embd ** -0.5 * 0.5)
            if name.endswith(("proj.weight", "down.weight")) or name.startswith("values"):
                nn.init.zeros_(p)  # blocks start as the identity (muP-like, as in modded-nanogpt's records), tables off
        angles = torch.outer(torch.arange(c.block_size).float(),
                             c.rope_theta ** (-torch.arange(0, c.head_dim, 2).float() / c.head_dim))
        self.register_buffer("turn", torch.polar(torch.ones_like(angles), angles)[:, None], persistent=False)

    def forward(self, idx, select=None, cache=None, tree=None):
        """idx (B, T), right-padded -> logits (B, T, V); with select, a pair of indices (M,), of those places only:
        (M, V).

        Padding needs no mask: it stands to the right of everything real, where causal attention never looks. The
        head is an eighth of a small model's work and prompts need none of it, hence `select`. cache, a list, collects
        each layer's (k, v), the sampler's prefill. tree: (position, previous, branch), each (B, T), when a row is a
        prompt with several replies behind it: a reply's tokens see the prompt and their own branch only."""
        T = idx.shape[1]
        bias = torch.full((T, T), -math.inf, device=idx.device).triu(1)
        if tree is None:
            assert T <= self.config.block_size, f"sequence of {T} tokens, block_size is {self.config.block_size}"
            turn = self.turn[:T]                                                              # (T, 1, hd/2)
            before = F.pad(idx, (1, 0), value=PAD)[:, :T]
        else:
            position, previous, branch = tree
            other = (branch[:, None, :] > 0) & (branch[:, None, :] != branch[:, :, None])
            bias = bias.masked_fill(other, -math.inf)[:, None, None]                          # (B, 1, 1, T, T)
            turn = self.turn[position]                                                        # (B, T, 1, hd/2)
            before = idx.gather(1, previous).masked_fill(position == 0, PAD)
        x, values = self.read(idx, before)
        for block, more in zip(self.blocks, values):
            q, k, v = block.heads(x, turn, more)
            if cache is not None:
                cache.append((k, v))
            x = block.finish(x, block.attend(q, k, v, bias))
        return self.logits(x if select is None else x[select])

    def read(self, token, before):
        """Tokens (B, T), each with the one before it (PAD before the first) -> the residual stream (B, T, C), and what
        they add to each layer's values, (n_layer, B, T, KV, hd)."""
        values, c = self.values(token) + self.values_before(before), self.config
        return self.embed(token), values.unflatten(-1, (c.n_layer, c.n_kv_head, c.head_dim)).movedim(2, 0)

    def logits(self, x):
        """Residual stream (..., C) -> logits (..., V)."""
        return self.head(self.norm(x) * self.sharpness.exp())      # (C) times, not (V): the same

    def num_params(self):
        return sum(p.numel() for p in self.parameters())


def logprobs(model, idx, mask, tree=None):
    """Log-probs of the tokens of idx (B, T) where mask (B, T) is true, in row order: (M,), float32. mask[:, 0] must be
    false (nothing predicts the first token). Also returns the entropy (M,) of each prediction, detached. tree: see
    GPT.forward."""
    row, t = mask.nonzero(as_tuple=True)
    target = idx[mask]                                             # now, as on CUDA it waits for what was launched
    before = t - 1 if tree is None else tree[1][mask]              # token t is predicted at t - 1, or where tree says
    spare = 0, -len(row) % 64                                      # few different M: see tune
    logits = model(idx, (F.pad(row, spare), F.pad(before, spare)), tree=tree)[:len(row)]
    logp = F.log_softmax(logits.float(), -1)
    entropy = -(logp.detach().exp() * logp.detach()).sum(-1)
    return logp.gather(-1, target[:, None])[:, 0], entropy


def pad_rows(rows, multiple=8, fill=PAD):
    """Lists of ids, or of what else has the type of `fill` -> (B, T) right-padded, T rounded up to `multiple`, so that
    few distinct shapes occur."""
    T = -(-max(map(len, rows)) // multiple) * multiple
    return torch.tensor([[*row, *[fill] * (T - len(row))] for row in rows], dtype=torch.tensor(fill).dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def pick(logits, u, temperature):
    """Next tokens (B,) and their log-probs (B,) from logits (B, V) and uniforms u (B,).

    Inverse-CDF sampling: the token whose slice of the cumulated probabilities contains u. One uniform a token, drawn
    beforehand, makes a rollout independent of its neighbours, of batching and of compaction; and a uniform costs
    far less than the V exponentials of the Gumbel trick."""
    heat = temperature or 1.0
    x = logits.to(torch.float, copy=True).div_(heat)     # (B, V), changed in place from here on: memory is what costs
    top = x.amax(-1, keepdim=True)
    cdf = x.sub_(top).exp_().cumsum_(-1)                 # of weights: divided by its last entry, of probabilities
    if temperature == 0:
        token = logits.argmax(-1, keepdim=True)
    else:
        token = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:])      # the first that reaches it: none of weight 0
        token = token.clamp(max=x.shape[-1] - 1)                       # beyond the last only if some are not finite
    return token[:, 0], (logits.gather(-1, token).float() / heat - top - cdf[:, -1:].log())[:, 0]


def uniforms(rows, steps, seed):
    """(rows, steps) in (0, 1]."""
    return 1 - torch.rand(rows, steps, generator=torch.Generator().manual_seed(seed))


def _check(model, prompts, max_new_tokens):
    longest = max(map(len, prompts), default=0) + max_new_tokens
    if max_new_tokens < 1:
        raise ValueError("max_new_tokens must be 1 or more")
    if not all(prompts):
        raise ValueError("an empty prompt: give each at least one token")
    if longest > model.config.block_size:
        raise ValueError(f"prompt + max_new_tokens = {longest} tokens, more than block_size {model.config.block_size}")


def cpu_says(name):
    """What Linux says of the first core under this name; '' elsewhere."""
    with suppress(OSError), open("/proc/cpuinfo") as f:
        return next((line.partition(":")[2].strip() for line in f if line.startswith(name)), "")
    return ""


def has_bfloat16(device):
    """Whether its matrix products are in hardware: emulated, they are slower than float32's."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(cpu_says("flags").split())


THREADS = min(8, cores())  # sampler and learner threads on a CPU


def tune(device):
    """Settings of the process. On Linux glibc hands large blocks back to the kernel after every step and faults them in
    again: 10.6k tokens/s against 39.8k with these three settings (a training loop over varying lengths on 2 cores). And
    oneDNN compiles a matrix product for each shape and keeps 1,024 of them; we meet more. It reads the setting at its
    first product."""
    torch.set_num_threads(1)                          # on a CPU our own threads each run whole chunks
    if device == "cuda":
        torch.set_float32_matmul_precision("high")    # TF32
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "4096")
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)              # M_MMAP_MAX: no separate mappings
        libc.mallopt(-1, 2 ** 31 - 1)    # M_TRIM_THRESHOLD: keep what was freed
        libc.mallopt(-2, 256 << 20)      # M_TOP_PAD: grow in large pieces


@torch.inference_mode()
def generate_naive(model, prompts, max_new_tokens, temperature=1.0, tries=1, seed=0, stop=END):
    """The specification of `generate`: one row at a time, the whole sequence again for every token, no cache."""
    _check(model, prompts, max_new_tokens)
    device, tokens, logps = next(model.parameters()).device, [], []
    u = uniforms(len(prompts) * tries, max_new_tokens, seed)
    for r in range(len(prompts) * tries):
        row, lps = list(prompts[r // tries]), []
        while len(lps) < max_new_tokens and (not lps or row[-1] != stop):
            logits = model(torch.tensor([row], device=device))[:, -1]
            token, logp = pick(logits, u[r, len(lps)][None].to(device), temperature)
            row.append(token.item())
            lps.append(logp.item())
        tokens.append(row[len(prompts[r // tries]):])
        logps.append(lps)
    return tokens, logps


@torch.inference_mode()
def generate(model, prompts, max_new_tokens, temperature=1.0, tries=1, seed=0, stop=END, rows=0, threads=0,
             dtype="float32"):
    """Sample `tries` replies to each prompt. prompts: lists of ids of any lengths. Returns (tokens, logps), two lists
    of len(prompts) * tries lists, the tries of one prompt side by side; a reply ends with `stop` (any id but PAD; -1:
    never) or after max_new_tokens. rows, threads (CPU only): 0 leaves them to us.

    How it is fast: each prompt is read once (prefill) and its cache copied to all its tries; then one decode step a
    token over a KV cache of `rows` places, where every row stands at a position of its own. A finished row's place
    goes to the next waiting row, so the batch stays full while any waits. On a CPU prompts are dealt to threads, each
    with a cache of its own. A step runs without Python: traced on a CPU, a captured graph on CUDA (_decode). What is
    sampled is still a function of the prompt, the row's uniforms and the weights alone.
    dtype="bfloat16" runs the matrix products in it and rounds keys, values and scores, as the training forward does on
    a CPU (on CUDA that is fused, and rounds otherwise), so that the log-probs remain that forward's (`mismatch` in
    metrics.jsonl is what difference remains)."""
    _check(model, prompts, max_new_tokens)
    device = next(model.parameters()).device.type
    cuda = device == "cuda"
    rows = rows or ((2048 if dtype == "bfloat16" else 512) if cuda else 384)
    threads = 1 if cuda else threads or THREADS        # on CUDA all chunks decode in the same places
    model = _twin(model, dtype)
    u = uniforms(len(prompts) * tries, max_new_tokens, seed)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # neighbours of like length: little padding
    parts = max(min(threads, len(order)), -(-len(order) // 2048))          # bounds the prompts' caches
    chunks = [order[k::parts] for k in range(parts)]                       # each gets its share of long ones

    def work(chunk):
        # both are thread-local, so each thread enters them
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, dtype == "bfloat16"):
            where = [i * tries + t for i in chunk for t in range(tries)]
            return where, *_decode(model, [prompts[i] for i in chunk], max_new_tokens, temperature, tries, u[where],
                                   stop, rows, step)

    step = None if cuda else _trace(model, dtype, temperature)
    tokens, logps = [None] * len(u), [None] * len(u)
    for where, ids, lps in threaded(work, chunks, threads):      # ids, lps (rows, steps) on the CPU
        over = ids == stop
        ends = torch.where(over.any(1), over.int().argmax(1) + 1, ids.shape[1]).tolist()
        for r, n, row, lp in zip(where, ends, ids.numpy(), lps.numpy()):
            tokens[r], logps[r] = row[:n].tolist(), lp[:n].tolist()
    return tokens, logps


_twins = weakref.WeakKeyDictionary()  # network -> {(dtype, device): its copy for sampling}


def _twin(model, dtype):
    """The network's copy for sampling, up to date. It holds the traced steps, which a copy or a checkpoint of the
    network itself should not carry, and in bfloat16 its matrices are in it (autocast keeps no casts under
    inference_mode: it would cast each anew for each token)."""
    twins, key = _twins.setdefault(model, {}), (dtype, model.sharpness.device)
    if key not in twins:
        twins[key] = copy.deepcopy(model)
        for m in twins[key].modules():
            if isinstance(m, nn.Linear) and dtype == "bfloat16":
                m.weight = nn.Parameter(m.weight.bfloat16(), requires_grad=False)
    twins[key].load_state_dict(model.state_dict())
    return twins[key]


_pool = lru_cache(ThreadPoolExecutor)  # one of each size, for good


def threaded(work, items, threads):
    """[work(item) for item in items], on so many threads."""
    return list(_pool(threads).map(work, items) if threads > 1 else map(work, items))


def _prefill(model, prompts):
    """Read each prompt once. Returns keys and values (n_layer, 2, N, KV, P, hd) with P the longest prompt, the lengths
    (N,), and the logits (N, V) after each prompt."""
    device = next(model.parameters()).device
    lens = torch.tensor([len(p) for p in prompts], device=device)
    parts, outs, P, rows = [], [], int(lens.max()), 256 if device.type == "cuda" else 64
    for i in range(0, len(prompts), rows):
        idx, cache = pad_rows(prompts[i:i + rows]).to(device)[:, :model.config.block_size], []
        outs.append(model(idx, (torch.arange(len(idx), device=device), lens[i:i + rows] - 1), cache))
        parts.append(F.pad(torch.stack([torch.stack(pair) for pair in cache]), (0, 0, 0, P - idx.shape[1])))
    return torch.cat(parts, 2), lens, torch.cat(outs)


def _decode(model, prompts, max_new, temperature, tries, u, stop, places, step=None):
    """Decode in at most `places` places; a row that ends gives its place to the next waiting one. Returns ids and
    log-probs (N, max_new), N = len(prompts) * tries, on the CPU; behind a row's `stop` stands anything.

    With `step` (CPU, traced) the cache grows with the longest reply, and places that no row waits for are dropped.
    Without (CUDA) tensors keep their addresses, so that a step can be one captured graph: to launch its small kernels
    one by one takes longer than they run. The whole cache is then there at once, and a step reads as many of its first
    columns as are in use: a graph for each such width."""
    device = next(model.parameters()).device
    prefix, lens, first = _prefill(model, prompts)
    last = torch.tensor([p[-1] for p in prompts], device=device)
    N, c = len(prompts) * tries, model.config
    ids, lps, u = torch.full((N, max_new), PAD), torch.zeros(N, max_new), u.to(device)
    static = step is None
    if static:
        rooms, graphs = (vars(model).setdefault(name, {}) for name in ("rooms", "graphs"))        # for all calls
        room = rooms[places] = rooms.get(places) or _places(c, places, c.block_size, c.block_size, prefix.dtype, device)
        room.lens[:], room.t[:] = 1, 1       # an earlier call's: now, idle places might write past the cache
        z = SimpleNamespace(**vars(room))
        z.cache, end = room.cache[..., :0, :], max_new + 1
        z.ids, z.lps, z.u = room.ids[:, :end], room.lps[:, :end], room.u[:, :end]
    else:
        z = _places(c, min(places, N), 0, max_new, prefix.dtype, device)
    row, waiting = torch.full((len(z.t),), -1), 0                 # place -> row of ids (-1: free); next row to start

    def widen(columns):
        more = -(-columns // 16) * 16 - z.cache.shape[4]
        if more > 0:                         # on a CPU no window: a product over a part of the cache would copy it
            z.cache = room.cache[..., :-(-columns // 64) * 64, :] if static else F.pad(z.cache, (0, 0, 0, more))
    while True:
        # 1) Who has ended hands in its reply and frees its place
        over = ((z.ids[:, :-1] == stop).any(1) | (z.t >= max_new)).cpu() & (row >= 0)   # on CUDA a sync point
        place = over.nonzero()[:, 0]
        ids[row[place]], lps[row[place]] = z.ids[place, :-1].cpu(), z.lps[place, :-1].cpu()
        row[place], z.t[place.to(device)] = -1, 1                 # or an idle place would soon make the cache grow
        # 2) Free places go to waiting rows: the prompt's cache goes there, the first token is drawn from its logits
        free = (row < 0).nonzero()[:, 0]
        new = torch.arange(waiting, min(N, waiting + len(free)))
        waiting += len(new)
        if len(new):
            place = free[:len(new)]
            row[place] = new
            place, new, task = (x.to(device) for x in (place, new, new // tries))
            P = int(lens[task].max())                             # prompts come in order of their length
            widen(P)
            for cache, one in zip(z.cache, prefix):               # a layer at a time: all at once would take 2 GB more
                cache[:, place, :, :P] = one[:, task, :, :P]
            token, logp = pick(first[task], u[new, 0], temperature)
            z.token[place], z.before[place], z.lens[place], z.t[place] = token, last[task], lens[task], 1
            z.ids[place], z.lps[place, 0] = PAD, logp
            z.ids[place, 0], z.u[place, :-1] = token, u[new]
        elif len(free) == len(row):                               # nobody waits, nobody is busy
            return ids, lps
        elif not static and len(free) > max(15, 0.15 * len(row)):
            keep = -(-(len(row) - len(free)) // 16) * 16          # of few sizes: oneDNN compiles products for each
            stay = (row < 0).int().argsort(stable=True)[:keep]    # the busy places first
            row = row[stay]
            for name, x in vars(z).items():
                setattr(z, name, x.index_select(2 if name == "cache" else 0, stay))
        # 3) Some steps before the next look, for looking, refilling and dropping cost time
        ahead = 8 if static else 4 if len(row) > 32 else 1
        widen(int((z.lens + z.t).max()) + ahead)
        if static:
            key = places, z.cache.shape[4], max_new, temperature
            step = graphs[key] = graphs.get(key) or _capture(_Step(model, temperature), z)
        for _ in range(ahead):
            step(*vars(z).values())


def _places(c, R, columns, longest, dtype, device):
    """R idle places, each for a row that is being decoded: what a _Step takes, in its order."""
    token, before, lens, t = torch.ones(4, R, dtype=torch.long, device=device)
    lps, u = torch.zeros(2, R, longest + 1, device=device)
    return SimpleNamespace(
        cache=torch.zeros(c.n_layer, 2, R, c.n_kv_head, columns, c.head_dim, dtype=dtype, device=device),
        token=token, before=before, lens=lens,                    # the last two tokens, and the prompt's length
        t=t, ids=torch.zeros_like(lps, dtype=torch.long),         # t tokens of the reply so far, which are these,
        lps=lps, u=u)                                             # with their log-probs; a uniform for each


class _Step(nn.Module):
    """One token more in every place, in place: the last one, which followed `before`, is written to the next column of
    its row's cache and attends to the columns up to it, then the next is picked. A row that is over runs on until its
    place is taken; its tokens beyond the longest reply fall into a column that is not read. Two things are for the
    trace (_trace): sizes are read from `shape`, never by len(), so that it holds for any; and this is a module, so that
    it reads the weights at each call: a function's trace has them as constants, and what follows from them alone, such
    as exp(sharpness), computed once."""

    def __init__(self, model, temperature):
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, cache, token, before, lens, t, ids, lps, u):
        model, position = self.model, lens + t - 1                             # position (R,): a row's own
        row = torch.arange(token.shape[0], device=token.device)
        hidden = torch.arange(cache.shape[4], device=token.device) > position[:, None]
        bias = torch.zeros(hidden.shape, device=token.device).masked_fill_(hidden, -math.inf)[:, None, None, None]
        x, values = model.read(token[:, None], before[:, None])
        turn = model.turn[position][:, None]                                   # (R, 1, 1, hd/2)
        for block, more, (k_cache, v_cache) in zip(model.blocks, values, cache):  # (n_layer, 2, R, KV, columns, hd)
            q, k, v = block.heads(x, turn, more)
            k_cache[row, :, position], v_cache[row, :, position] = k[:, :, 0], v[:, :, 0]
            x = block.finish(x, block.attend(q, k_cache, v_cache, bias))
        uniform = u.gather(1, t[:, None])[:, 0]
        new, logp = pick(model.logits(x)[:, 0], uniform, self.temperature)
        before.copy_(token)
        token.copy_(new)
        ids.scatter_(1, t[:, None], new[:, None])
        lps.scatter_(1, t[:, None], logp[:, None])
        t.add_(1).clamp_(max=ids.shape[1] - 1)
        return token                                              # a trace has to return something


def _tried(make, step, z, done):
    """make() gives `step` in a form that runs without Python. It is tried against the plain one from the same state z;
    on a difference beyond rounding, or a failure, the plain one is returned and the reason printed, so that a machine
    nobody tried still trains. The state is left as it was, but for columns of the cache that are written again before
    they are read."""
    changing, results = (z.token, z.before, z.t, z.ids, z.lps), []
    saved = [x.clone() for x in changing]

    def rewind():
        for x, old in zip(changing, saved):
            x.copy_(old)
    try:
        quick = make()
        for run in (step, quick):
            rewind()
            for _ in range(3):                                    # a trace is optimized in its second run
                run(*vars(z).values())
            results.append((z.ids.clone(), z.lps.clone()))
        (a, la), (b, lb) = results
        same = ((a == b) & ((la - lb).abs() < 0.05)).all(1).float().mean().item()
        if same < 0.97:
            raise RuntimeError(f"it agrees with the plain one in {same:.0%} of the rows only")
        return quick
    except Exception as error:  # whatever torch or the driver objects to: slower is better than not at all
        # torch ends a failed capture with an error that hides the first one: both
        why = ", after ".join(f"{type(e).__name__}: {e}" for e in (error, error.__context__) if e)
        print(f"decode step not {done}, so slower: {why}", flush=True)
        return step
    finally:
        rewind()


def _trace(model, dtype, temperature):
    """The CPU's counterpart of a captured graph: a step as a list of operations that torch runs by itself. Python
    between some 300 small ones costs up to a third of a step, and as much again on two threads, which wait for each
    other (the interpreter lock). _tried has places of other sizes, as the trace may hold one for a constant."""
    steps = vars(model).setdefault("steps", {})                   # of this network: they go when it goes
    if temperature not in steps:
        step, draw = _Step(model, temperature), torch.Generator()
        example, z = (_places(model.config, R, 8 * R, 8 * R, getattr(torch, dtype), "cpu") for R in (2, 3))
        z.cache.normal_(generator=draw)
        z.token.random_(model.config.vocab_size, generator=draw)
        z.lens.random_(1, 3, generator=draw)
        z.u.uniform_(generator=draw)
        with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16, dtype == "bfloat16"):
            warnings.simplefilter("ignore")                       # TorchScript is deprecated; sizes may be constants
            steps[temperature] = _tried(
                lambda: torch.jit.trace(step, tuple(vars(example).values()), check_trace=False), step, z, "traced")
    return steps[temperature]


_captured = []   # every graph, for good: one that ends frees the matrix products' workspace of its stream, which all
                 # share (pytorch issue 193402); and one whose capture failed is still known to the allocator


def _capture(step, z):
    """One captured CUDA graph of a step on z."""
    def capture():
        for _ in range(2):                                        # warm up allocators, autotuners before the capture
            step(*vars(z).values())
        graph = torch.cuda.CUDAGraph()
        _captured.append(graph)
        # one pool for all: nothing in it outlives a replay. But a failed capture's may still be recording, and its
        # stream stays current: hence pop, and the outer context, which puts back the stream of now
        pool = vars(step.model).pop("pool", None) or torch.cuda.graph_pool_handle()
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool=pool):
            step(*vars(z).values())
        step.model.pool = pool
        return lambda *tensors: graph.replay()                    # whatever it is given: what was captured
    return _tried(capture, step, z, "captured")


def main():
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tune(device)
    model = GPT(GPTConfig()).to(device)
    print(f"{model.num_params():,} parameters, vocabulary {VOCAB_SIZE}, {device}")
    text = "def f(x):\n    x = [v + 3 for v in x]\n    return x"
    ids = encode(text)
    print(f"{len(text)} characters -> {len(ids)} tokens:\n  " + " ".join(repr(decode([i])) for i in ids))
    nn.init.normal_(model.head.weight, std=0.3)                   # a random but opinionated network
    prompts = [ids[:n] for n in range(4, len(ids))] * 2
    speeds = {}
    for name, fn in (("naive", generate_naive), ("fast", generate)):
        fn(model, prompts[:2], 8, tries=2)                        # warm up
        start = time.perf_counter()
        tokens, lps = fn(model, prompts, 64, tries=4, seed=1)
        speeds[name] = sum(map(len, tokens)) / (time.perf_counter() - start)
        print(f"{name:>6}: {speeds[name]:8,.0f} tokens/s, first reply {tokens[0][:5]}..., "
              f"log-prob {sum(lps[0]):.4f}")
    print(f"fast / naive = {speeds['fast'] / speeds['naive']:.1f}x (a full batch gains more)")


if __name__ == "__main__":
    main()
