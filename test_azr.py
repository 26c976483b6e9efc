"""
test_azr.py: what must stay true, one line each. Standard library's unittest, offline, no GPU needed (where there is
one, a test more runs), under 3 minutes on 2 cores.

    python test_azr.py                      # everything
    python test_azr.py TestSampler          # one class
"""
import collections
import contextlib
import copy
import functools
import importlib.util
import inspect
import io
import itertools
import json
import math
import multiprocessing
import multiprocessing.resource_tracker
import os
import pathlib
import pickle
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import unittest
import unittest.mock
import xml.etree.ElementTree
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from html.parser import HTMLParser
from timeit import timeit
from types import SimpleNamespace

import numpy as np
import torch
import torch.overrides
import tqdm

import eval as evaluation
import executor
import model as network
import selfplay
import train
from executor import Executor
from model import END, GPT, GPTConfig, ID, PAD, decode, encode, generate, generate_naive, logprobs, pad_rows
from selfplay import ANSWER, KINDS, Task
from trr import advantages, policy_loss

HERE = os.path.dirname(os.path.abspath(__file__))
inspect.getsource = functools.cache(inspect.getsource)     # a base's name is asked for in every run: .3 s each time
only_one_of_the_people = unittest.mock.patch.object(        # where that suite is not what is tested
    evaluation, "PEOPLE", evaluation.PEOPLE[:evaluation.PEOPLE.index("def f", 9)])
# Fast paths meet their slow twins on inputs that are new each time; SEED=n python test_azr.py repeats a run of them
FRESH = int(os.environ.get("SEED") or int.from_bytes(os.urandom(3), "big"))
SMALL = SimpleNamespace(references=2, n_inputs=4, large=False, hasty=0.0, patience=0.5, timid=False,
                        max_new=120)


def small_model(seed=0, **kw):
    """A network with opinions: random weights large enough that its samples end, differ and disagree."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**dict(n_layer=2, n_embd=32, n_head=4, n_kv_head=2, block_size=96), **kw}))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.2)
    with torch.no_grad():
        model.head.weight[END] += 0.3
        model.sharpness.fill_(0.2)
    return model


def refusal(test, call, *args):
    """What the call says on stderr; it must end with exit code 2 and one line."""
    with contextlib.redirect_stderr(io.StringIO()) as err, test.assertRaises(SystemExit) as caught:
        call(*args)
    test.assertEqual(caught.exception.code, 2)
    test.assertRegex(err.getvalue(), r"\Aerror: .*\n\Z")
    return err.getvalue()


def random_prompts(n, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(300) for _ in range(rng.randint(1, 30))] for _ in range(n)]


class TestTokenizer(unittest.TestCase):
    def test_round_trip(self):
        """Any text comes back: Python, accents, emoji, control characters."""
        rng = random.Random(0)
        texts = ["def f(x):\n    x = [v + 3 for v in x]\n    return x", "naïve \u00e9\U0001f600\x00\x7f", ""]
        texts += ["".join(chr(rng.randrange(1, 0x2fff)) for _ in range(50)) for _ in range(50)]
        for text in texts:
            self.assertEqual(decode(encode(text)), text)

    def test_no_text_makes_a_role_token(self):
        """A program cannot forge the end of a prompt: role tokens spelled out in text stay plain characters."""
        for name in network.SPECIAL:
            self.assertTrue(all(t < ID["<|pad|>"] for t in encode(f"x {name} y")), name)

    def test_digits_are_single(self):
        """Numbers are spelled digit by digit, the way arithmetic is done: no piece holds two."""
        self.assertEqual([decode([t]) for t in encode("2047")], list("2047"))
        self.assertFalse([p for p in network.PIECES if sum(c.isdigit() for c in p) > 1])


class TestSampler(unittest.TestCase):
    def check_same(self, a, b):
        (tokens, logps), (tokens2, logps2) = a, b
        self.assertEqual(tokens, tokens2)
        for x, y in zip(logps, logps2):
            self.assertLess(max(abs(p - q) for p, q in zip(x, y)), 1e-3)

    def test_fast_equals_naive(self):
        """The sampler gives the specification's tokens and log-probs: unequal prompts, early ends, few places,
        threads."""
        for seed, kv in ((0, 1), (1, 2), (2, 4)):
            model, prompts = small_model(seed, n_kv_head=kv), random_prompts(7, seed)
            naive = generate_naive(model, prompts, 40, tries=3, seed=seed)
            self.assertGreater(len({len(t) for t in naive[0]}), 3, "the test needs rows that end early")
            for rows, threads in ((256, 1), (4, 1), (5, 2), (1, 1)):
                self.check_same(naive, generate(model, prompts, 40, tries=3, seed=seed, rows=rows, threads=threads))

    def test_fresh_inputs(self):
        """On weights and prompts never seen before fast is naive too; one row of 10 may part at a tie of rounding."""
        with self.subTest(SEED=FRESH):
            for seed, kv in ((FRESH, 1), (FRESH + 1, 4)):
                model, prompts = small_model(seed, n_kv_head=kv), random_prompts(5, seed)
                naive = generate_naive(model, prompts, 30, tries=2, seed=seed)
                fast = generate(model, prompts, 30, tries=2, seed=seed, rows=4, threads=2)
                same = [i for i, (a, b) in enumerate(zip(naive[0], fast[0])) if a == b]
                self.assertGreaterEqual(len(same), 9)
                self.check_same(*([[part[i] for i in same] for part in out] for out in (naive, fast)))

    def test_greedy_equals_naive(self):
        """Temperature 0 takes the likeliest token in both."""
        model, prompts = small_model(3), random_prompts(5, 3)
        self.check_same(generate_naive(model, prompts, 30, 0.0), generate(model, prompts, 30, 0.0))

    def test_static_shapes_equal_naive(self):
        """The steps that CUDA captures as graphs, run eagerly here, give the specification's tokens, whatever the state
        has served before: other prompts (long ones, whose idle places must not run out of the cache), few places or
        many, other lengths, weights that have learnt since."""
        model = small_model(4)
        with unittest.mock.patch.object(network, "_capture", lambda step, z: step), torch.inference_mode():
            for n, longest, places, before in ((5, 30, 16, 0), (9, 30, 4, 0), (3, 10, 16, 0), (40, 8, 16, 0),
                                               (5, 30, 16, 0), (8, 8, 16, 50), (2, 60, 16, 0)):
                prompts = [[7] * before + p for p in random_prompts(n, n)]
                u = network.uniforms(2 * n, longest, n)
                want, logps = generate_naive(model, prompts, longest, tries=2, seed=n)
                ids, lps = network._decode(model, prompts, longest, 1.0, 2, u, END, places)
                for row, lp, full, full_lp in zip(want, logps, ids.tolist(), lps.tolist()):
                    self.assertEqual(row, full[:len(row)])
                    self.assertLess(max(abs(a - b) for a, b in zip(lp, full_lp)), 1e-3)
                model.blocks[0].down.weight.mul_(-1.5)
        self.assertEqual(sorted(model.rooms), [4, 16])

    def test_a_capture_leaves_no_trace(self):
        """Where no graph can be captured the eager step is used, the reason is said, and the state is as it was."""
        model, prompts = small_model(9), random_prompts(6, 9)
        want = generate_naive(model, prompts, 20, tries=2, seed=9)[0]
        with torch.inference_mode(), contextlib.redirect_stdout(io.StringIO()) as said:
            ids, _ = network._decode(model, prompts, 20, 1.0, 2, network.uniforms(12, 20, 9), END, 8)
        self.assertEqual([row[:len(w)] for row, w in zip(ids.tolist(), want)], want)
        if not torch.cuda.is_available():
            self.assertIn("decode step not captured", said.getvalue())

    def test_a_failed_capture_says_why(self):
        """torch ends a failed capture with an error of its own; the reason printed is the first one, and the graph, of
        which the allocator may still know, stays."""
        @contextlib.contextmanager
        def failing(graph, pool):
            try:
                yield
            finally:
                raise RuntimeError("previous error during capture")

        fake, kept = unittest.mock.MagicMock(), len(network._captured)
        z = network._places(GPTConfig(n_layer=1), 2, 16, 16, torch.float32, "cpu")
        step = unittest.mock.MagicMock(side_effect=[None, None, ValueError("the cause")])     # 2 to warm up
        with contextlib.ExitStack() as stack:
            for name, new in (("current_stream", fake), ("stream", fake), ("graph", failing),
                              ("CUDAGraph", lambda: "graph"), ("graph_pool_handle", fake)):
                stack.enter_context(unittest.mock.patch.object(torch.cuda, name, new))
            said = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            self.assertIs(network._capture(step, z), step)
        self.assertIn("ValueError: the cause", said.getvalue())
        self.assertEqual(network._captured[kept:], ["graph"])
        del network._captured[kept:]

    def test_a_captured_graph_is_replayed(self):
        """What CUDA captures is used: with a stand-in for its graphs, whose replay repeats the call that was recorded,
        the tokens are the specification's and nothing falls back."""
        graphs, real = [], network._Step.forward

        class Graph:
            replays = 0

            def replay(self):
                self.replays += 1
                self.call()

        @contextlib.contextmanager
        def recording(graph, pool):
            graphs.append(graph)
            yield

        def advance(*args):
            if graphs and not hasattr(graphs[-1], "call"):
                graphs[-1].call = lambda: real(*args)
            return real(*args)
        model, prompts, fake = small_model(15), random_prompts(9, 15), unittest.mock.MagicMock()
        with contextlib.ExitStack() as stack:
            for name, new in (("Stream", fake), ("current_stream", fake), ("stream", fake), ("CUDAGraph", Graph),
                              ("graph", recording), ("graph_pool_handle", fake)):
                stack.enter_context(unittest.mock.patch.object(torch.cuda, name, new))
            stack.enter_context(unittest.mock.patch.object(network._Step, "forward", advance))
            said = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            with torch.inference_mode():
                ids, _ = network._decode(model, prompts, 30, 1.0, 2, network.uniforms(18, 30, 15), END, 4)
        self.assertEqual(said.getvalue(), "")
        self.assertGreater(sum(g.replays for g in graphs), 30)
        for row, full in zip(generate_naive(model, prompts, 30, tries=2, seed=15)[0], ids.tolist()):
            self.assertEqual(row, full[:len(row)])

    @unittest.skipUnless(torch.cuda.is_available(), "needs a GPU")
    def test_cuda_equals_cpu(self):
        """On a GPU the captured graph gives what the CPU gives, also after the weights have changed."""
        self.addCleanup(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("highest")                  # eval.main, in another test, sets TF32
        model, there, prompts = small_model(10), small_model(10).cuda(), random_prompts(40, 10)
        for _ in range(2):
            there.load_state_dict(model.state_dict())
            want = generate(model, prompts, 30, tries=4, seed=1)
            with contextlib.redirect_stdout(io.StringIO()) as said:
                got = generate(there, prompts, 30, tries=4, seed=1, rows=32)   # places are taken several times
            self.assertEqual(said.getvalue(), "", "the graph was not used")
            same = [i for i, (a, b) in enumerate(zip(want[0], got[0])) if a == b]
            self.assertGreater(len(same), 0.95 * len(want[0]))
            self.check_same(*([[part[i] for i in same] for part in out] for out in (want, got)))
            torch.nn.init.normal_(model.blocks[0].down.weight, std=0.2)

    def test_attention_in_one_kernel(self):
        """The kernel that a GPU is given computes the attention that stands written out, plain and branched."""
        block, g = small_model(11, n_kv_head=2).blocks[0], torch.Generator().manual_seed(0)
        q = torch.randn(3, 2, 2, 9, 8, generator=g)
        k, v = torch.randn(2, 3, 2, 9, 8, generator=g)
        plain = torch.full((9, 9), -torch.inf).triu(1)
        hidden = (torch.rand(3, 9, 9, generator=g) < 0.4) & ~torch.eye(9, dtype=torch.bool)
        for bias in (plain, plain.masked_fill(hidden, -torch.inf)[:, None, None]):
            gap = block.attend_fused(q, k, v, bias) - block.attend(q, k, v, bias)
            self.assertLess(gap.abs().max().item(), 1e-5)

    def test_weights_that_have_changed(self):
        """The sampler's copy and its traced step follow every weight: after an update none is remembered."""
        model, prompts = small_model(14), random_prompts(6, 14)
        for name, p in model.named_parameters():
            tokens = generate(model, prompts, 20, tries=2, seed=3)
            with torch.no_grad():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)), alpha=0.3)
            want = generate_naive(model, prompts, 20, tries=2, seed=3)
            self.assertNotEqual(tokens, want, f"the test needs a change of {name} to show")
            self.check_same(want, generate(model, prompts, 20, tries=2, seed=3))

    def test_bfloat16_twin(self):
        """Matrices cast once give what autocast gives, casting them for each token; and they follow the weights."""
        model, prompts = small_model(12), random_prompts(4, 12)
        for _ in range(2):
            twin = generate(model, prompts, 20, seed=3, dtype="bfloat16")
            plain = copy.deepcopy(model)                              # its steps would stay with it
            with unittest.mock.patch.object(network, "_twin", lambda m, dtype: m):
                self.assertEqual(twin, generate(plain, prompts, 20, seed=3, dtype="bfloat16"))
            torch.nn.init.normal_(model.blocks[0].down.weight, std=0.2)

    def test_without_a_trace(self):
        """The traced step is used where it can be; where this torch cannot trace, or its trace goes wrong, the plain
        step is used, the reason is said, and the tokens are the same."""
        model, prompts = small_model(13), random_prompts(6, 13)
        for dtype in ("float32", "bfloat16"):
            with contextlib.redirect_stdout(io.StringIO()) as said:
                want = generate(model, prompts, 20, tries=2, seed=3, dtype=dtype)
            self.assertEqual(said.getvalue(), "")
            for wrong in (unittest.mock.Mock(side_effect=AttributeError("no trace")),
                          lambda step, *a, **k: lambda cache, *rest: step(cache, *rest)[0].mul_(2)):
                with unittest.mock.patch.object(torch.jit, "trace", wrong), \
                        contextlib.redirect_stdout(io.StringIO()) as said:
                    self.assertEqual(want, generate(copy.deepcopy(model), prompts, 20, tries=2, seed=3, dtype=dtype))
                self.assertIn("decode step not traced", said.getvalue())

    def test_logprobs_equal_training_forward(self):
        """Ratio 1 at the first update: the sampler's log-probs are the training forward's, to 1e-3 in float32; in
        bfloat16 too, but where a sum is rounded the other way (one in ten at most)."""
        model, prompts = small_model(5), random_prompts(6, 5)
        for dtype, share in (("float32", 1.0), ("bfloat16", 0.9)):
            tokens, logps = generate(model, prompts, 30, temperature=1.0, tries=2, seed=5, dtype=dtype)
            rows = [prompts[i // 2] + t for i, t in enumerate(tokens)]
            idx = pad_rows(rows, 16)
            mask = torch.zeros_like(idx, dtype=torch.bool)
            for i, t in enumerate(tokens):
                mask[i, len(rows[i]) - len(t):len(rows[i])] = True
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                got, _ = logprobs(model, idx, mask)
            gap = (got - torch.tensor([lp for row in logps for lp in row])).abs()
            self.assertGreaterEqual((gap < 1e-3).float().mean().item(), share)
            self.assertLess(gap.max().item(), 0.2)

    def test_tries_differ(self):
        """Tries of one prompt get first tokens of their own; once a copied prefill gave all of them the same one."""
        tokens, _ = generate(small_model(6), [[1, 2, 3]], 5, tries=64, seed=6)
        self.assertGreater(len({t[0] for t in tokens}), 5)

    def test_seed(self):
        """Same seed, same rollouts; another seed, others."""
        model, prompts = small_model(7), random_prompts(4, 7)
        a, b, c = (generate(model, prompts, 20, seed=s)[0] for s in (1, 1, 2))
        self.assertEqual(a, b)
        self.assertNotEqual(a, c)

    def test_limits(self):
        """Empty and over-long prompts are refused by name, one new token works, and no prompts give no replies."""
        model = small_model(8)
        self.assertEqual(generate(model, [], 5), ([], []))
        self.check_same(generate_naive(model, [[1], [2, 3]], 1), generate(model, [[1], [2, 3]], 1))
        for fn in (generate, generate_naive):
            with self.assertRaisesRegex(ValueError, "empty prompt"):
                fn(model, [[]], 5)
            with self.assertRaisesRegex(ValueError, "block_size"):
                fn(model, [[1] * 90], 10)

    def test_distribution(self):
        """Inverse-CDF sampling draws each token as often as its probability says."""
        logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).repeat(40000, 1)
        token, logp = network.pick(logits, torch.rand(40000, generator=torch.Generator().manual_seed(0)), 1.0)
        share = torch.bincount(token, minlength=4) / 40000
        self.assertLess((share - logits[0].softmax(0)).abs().max().item(), 0.01)
        self.assertTrue(torch.allclose(logp, logits.log_softmax(-1).gather(1, token[:, None])[:, 0]))


class TestModel(unittest.TestCase):
    def test_causal(self):
        """A later token never changes an earlier prediction, so right padding needs no mask."""
        model, idx = small_model(), torch.randint(0, 300, (2, 20))
        other = idx.clone()
        other[:, 12:] = PAD
        self.assertTrue(torch.allclose(model(idx)[:, :12], model(other)[:, :12], atol=1e-5))

    def test_select(self):
        """Selecting positions before the head gives the same logits as selecting after."""
        model, idx = small_model(), torch.randint(0, 300, (3, 9))
        select = torch.rand(3, 9) > 0.5
        self.assertTrue(torch.allclose(model(idx, select), model(idx)[select], atol=1e-5))

    @unittest.skipUnless(importlib.util.find_spec("transformers"), "transformers is not installed")
    def test_is_qwen3(self):
        """The block is Qwen3's: under its names there the weights give the same logits, so published ones fit here."""
        model, idx = small_model(12), torch.tensor(random_prompts(1, 3))
        with torch.no_grad():
            for extra in (model.sharpness, model.values.weight, model.values_before.weight):
                extra.zero_()                                       # our additions, off
            script = runpy.run_path(os.path.join(HERE, "results", "beside_transformers.py"))
            difference = script["qwen3_twin"](model)(idx).logits - model(idx)
        self.assertLess(difference.abs().max().item(), 1e-3)

    def test_config_refused(self):
        """A shape that cannot work is refused by the field's name."""
        for bad, name in ((dict(n_head=3, n_kv_head=2), "n_head"), (dict(head_dim=3), "head_dim"),
                          (dict(n_layer=0), "n_layer")):
            with self.assertRaisesRegex(AssertionError, name):
                GPTConfig(**bad)


class TestTRR(unittest.TestCase):
    def test_hand_worked(self):
        """Eq. 8 on the eight numbers of trr.py's worked example, by hand; with a baseline a task an easy one gets 0."""
        r, cells = [1.0, -0.5, 1.0, 1.0, 0.75, 0.0, 0.0, -1.0], ["s"] * 4 + ["p"] * 4
        a = advantages(r, cells)
        self.assertTrue(torch.allclose(a[:4], torch.tensor([0.5, -1.5, 0.5, 0.5])))
        group = advantages(r, cells, [0, 0, 1, 1, -1, -1, -1, -1], "group")
        self.assertTrue(torch.allclose(group[:4], torch.tensor([1, -1, 0, 0]) * 0.75 / math.sqrt(0.375)))
        self.assertTrue(torch.allclose(group[4:], a[4:]))
        std = math.sqrt(sum((x + 0.0625) ** 2 for x in r[4:]) / 3)
        self.assertTrue(torch.allclose(a[4:], torch.tensor([(x + 0.0625) / std for x in r[4:]])))

    def test_cells_do_not_touch(self):
        """Another cell's rewards never change this cell's advantages; each cell's mean is 0 and its deviation 1."""
        rng = random.Random(0)
        cells = [rng.choice("abcdef") for _ in range(300)]
        r = [rng.gauss(ord(c), 1 + ord(c) % 7) for c in cells]
        a = advantages(r, cells)
        for cell in "abcdef":
            mine = [i for i, c in enumerate(cells) if c == cell]
            self.assertAlmostEqual(a[mine].mean().item(), 0, places=4)
            self.assertAlmostEqual(a[mine].std().item(), 1, places=4)
            self.assertTrue(torch.allclose(a[mine], advantages([r[i] for i in mine], ["x"] * len(mine)), atol=1e-5))

    def test_degenerate_cells(self):
        """A cell of one reward or of equal ones gets exactly 0, never NaN, also where floats almost cancel."""
        self.assertEqual(advantages([3.0], ["a"]).tolist(), [0.0])
        self.assertEqual(advantages([0.1] * 7, ["a"] * 7).tolist(), [0.0] * 7)
        self.assertEqual(advantages([0.1 + 1e-9, 0.1], ["a"] * 2, [0, 0], "group").tolist(), [0.0] * 2)
        with self.assertRaises(AssertionError):
            advantages([float("nan"), 1.0], ["a", "a"])

    def test_group_removes_difficulty(self):
        """mode=group: adding a constant to all tries of one task changes nothing; the tries of a task sum to 0."""
        r, g = [1.0, 0, 1, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 1, 1, 1]
        a = advantages(r, ["s"] * 8, g, "group")
        b = advantages([x + 5 * k for x, k in zip(r, g)], ["s"] * 8, g, "group")
        self.assertTrue(torch.allclose(a, b, atol=1e-5))
        self.assertAlmostEqual(a[:4].sum().item(), 0, places=5)
        flat = advantages([1, -0.5, 1, 1], ["s"] * 4, [0, 0, 1, 1], "group", lengths=[10, 30, 10, 10])
        self.assertEqual(flat[2:].tolist(), [0, 0], "over tokens too")

    def test_floor_and_global(self):
        """A cell of nearly equal rewards is divided by `floor`, a wide one by its own deviation; global is one cell."""
        self.assertTrue(torch.allclose(advantages([0.0, 0.1], ["a"] * 2, floor=0.2), torch.tensor([-0.25, 0.25])))
        self.assertTrue(torch.equal(advantages([0.0, 9.0], ["a"] * 2, floor=0.2), advantages([0.0, 9.0], ["a"] * 2)))
        r = [1.0, 0.0, 5.0, 6.0]
        self.assertTrue(torch.equal(advantages(r, list("aabb"), mode="global"), advantages(r, ["x"] * 4)))

    def test_clip_is_even_and_counted(self):
        """Both sides clip at the same distance; `clipped` counts the tokens whose gradient that takes away; what
        stands behind a reply, however far off, neither counts nor makes a NaN."""
        logp = torch.tensor([[math.log(1.25), math.log(1.15), 0.0, 1e3]], requires_grad=True)
        mask = torch.tensor([[1, 1, 1, 0]])
        loss, stats = policy_loss(logp, torch.zeros(1, 4), torch.ones(1), mask)
        loss.backward()
        self.assertEqual((logp.grad[0] != 0).tolist(), [False, True, True, False])
        self.assertTrue(logp.grad.isfinite().all() and loss.isfinite())
        self.assertEqual((float(stats["clipped"]), float(stats["tokens"])), (1, 3))

    def test_token_weights(self):
        """lengths= whitens as if each reward stood on each of its tokens, as veRL's masked_whiten does."""
        r, n = [1.0, -0.5, 0.2], [3, 1, 6]
        a = advantages(r, ["s"] * 3, lengths=n)
        flat = torch.tensor([x for x, k in zip(r, n) for _ in range(k)])
        want = (torch.tensor(r) - flat.mean()) / flat.std()
        self.assertTrue(torch.allclose(a, want, atol=1e-5))

    def test_loss_gradient(self):
        """At ratio 1 the gradient is -A / tokens on reply tokens and exactly 0 on padding."""
        logp = torch.randn(3, 5, requires_grad=True)
        mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
        adv = torch.tensor([1.0, -2.0, 0.5])
        policy_loss(logp, logp.detach(), adv, mask)[0].backward()
        self.assertTrue(torch.allclose(logp.grad, -adv[:, None] * mask / mask.sum(), atol=1e-6))
        logp.grad = None
        policy_loss(logp, logp.detach(), adv, mask, average="sequence")[0].backward()
        self.assertTrue(torch.allclose(logp.grad, -adv[:, None] * mask / mask.sum(1, keepdim=True) / 3, atol=1e-6))

    def test_clip(self):
        """Past the clip a good token gains nothing more, a bad one loses nothing more; moving back always counts."""
        for ratio, adv, moves in ((1.5, 1.0, False), (1.5, -1.0, True), (0.5, -1.0, False), (0.5, 1.0, True)):
            logp = torch.tensor([[math.log(ratio)]], requires_grad=True)
            policy_loss(logp, torch.zeros(1, 1), torch.tensor([adv]), torch.ones(1, 1))[0].backward()
            self.assertEqual(bool(logp.grad.abs().item() > 0), moves)

    def test_micro_batches_add_up(self):
        """With norm= the losses of micro-batches sum to the loss of the whole."""
        logp, old, adv, mask = torch.randn(6, 4), torch.randn(6, 4), torch.randn(6), torch.rand(6, 4) > 0.3
        for average, norm in (("token", mask.sum()), ("sequence", 6)):
            whole = policy_loss(logp, old, adv, mask, average=average)[0]
            parts = sum(policy_loss(logp[i:i + 2], old[i:i + 2], adv[i:i + 2], mask[i:i + 2], average=average,
                                    norm=norm)[0] for i in (0, 2, 4))
            self.assertAlmostEqual(whole.item(), parts.item(), places=5)


class TestGame(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.ex = Executor(workers=1, timeout=0.2)
        cls.addClassCleanup(cls.ex.close)

    def task(self, kind, program="def f(x):\n    x = x + 3\n    return x", inputs=("4",), message=""):
        (task, why), = selfplay.make_tasks(self.ex, [(kind, program, list(inputs), message)])
        self.assertEqual(why, "")
        return task

    def verdict(self, task, answer):
        return selfplay.judge_answers(self.ex, [task], [answer])[0]

    def test_every_operation_is_drawn(self):
        """Whatever the grammar holds comes up in programs that pass, the loops that build another list included."""
        for large in (False, True):
            drawn, _ = selfplay.draw_programs(self.ex, random.Random(2), [1, 2] * (2000 if large else 600), large=large)
            text = "\n".join(d.program for d in drawn)
            for ops in (selfplay.OPS, *[selfplay.LARGE_OPS] * large):
                for _, _, expression in sum(ops.values(), []):
                    self.assertRegex(text, re.sub(r"\\{.\\}", ".{1,2}", re.escape(expression)))

    def test_length_gates_count_tokens_of_every_text(self):
        """Tokens as well as lines bound a program; the longest input and the longest output decide; a prompt that
        leaves the solver no room is refused."""
        f, wide = selfplay.fault, "def f(x):\n    return " + " + ".join(["987654"] * 12)
        self.assertEqual(f("deduction", wide, ["1"], "", 6), "long program")
        self.assertEqual(f("induction", "def f(x):\n    return x", ["1", "2" * 99], "", 6), "long input")
        grow = ("induction", "def f(x):\n    return [x] * x", ["1", "2", "3", "60"], "")
        self.assertEqual(selfplay.make_tasks(self.ex, [grow])[0][1], "long output")
        one = ("deduction", "def f(x):\n    return x", ["1"], "")
        self.assertEqual([selfplay.make_tasks(self.ex, [one], n)[0][1] for n in (5, 50)], ["long prompt", ""])

    def test_only_the_hidden_half_must_differ(self):
        """A constant hidden half is refused whatever the shown half is, and so never judged; a constant shown one is
        fine."""
        self.assertTrue(selfplay.hidden_agree(["1", "2", "3", "3"]))
        self.assertFalse(selfplay.hidden_agree(["3", "3", "3", "4"]))

    def test_induction_hides_its_second_half(self):
        """The solver's prompt shows the first half of the pairs, each input with its own output, and nothing of the
        rest."""
        t = Task("induction", "p", ["1", "2", "3", "4"], ["11", "22", "33", "44"], [], " add")
        text = decode(selfplay.solve_prompt(t))
        self.assertIn("<|input|>1<|output|>11<|input|>2<|output|>22<|message|> add", text)
        self.assertFalse({"3", "4"} & set(text))
        d, = selfplay.draw_programs(self.ex, random.Random(1), [2], 4)[0]
        made, _ = selfplay.make_tasks(self.ex, [("induction", d.program, d.inputs, "")])[0]
        self.assertEqual(d.task("induction", random.Random(0)).outputs, made.outputs)

    def test_what_is_unparsable(self):
        """A forbidden program is a format error; an abduction whose program refuses the answer is a wrong answer."""
        (ind, _), (abd, _) = selfplay.make_tasks(self.ex, [
            ("induction", "def f(x):\n    return x", ["1", "2", "3", "4"], ""),
            ("abduction", "def f(x):\n    return [0, 1][x]", ["1"], "")])
        verdicts = selfplay.judge_answers(self.ex, [ind, abd, abd], ["def f(x):\n    return id(x)", "7", "{}"])
        self.assertEqual(verdicts, ["unparsable", "wrong", "wrong"])
        bad = replace(abd, program="def f(x) return x")
        self.assertEqual(selfplay.judge_answers(self.ex, [bad], ["7"]), ["wrong"])
        no_input = selfplay.make_tasks(self.ex, [("abduction", "def f():\n    return 7", [""], "")])[0][0]
        for task, answer, verdict in ((abd, "", "unparsable"), (no_input, "", "right"), (abd, "1  # c", "right"),
                                      (abd, "0] # c", "unparsable")):
            self.assertEqual(selfplay.judge_answers(self.ex, [task], [answer]), [verdict], answer)

    def test_what_is_banned(self):
        """Of depth 1 the pairs, whichever of the inputs it is; from depth 2 on the program, whatever its input."""
        one, two = (Task("induction", f"p{d}", ["1", "2"], [], [], depth=d) for d in (1, 2))
        banned = selfplay.ban([one, two])
        self.assertEqual([selfplay.is_banned(p, i, banned) for p, i in (
            ("p1", ["9"]), ("p1", ["9", "2"]), ("p1", ["1"]), ("p2", ["9"]), ("p3", ["1"]))],
            [False, True, True, True, False])

    def test_searches(self):
        """A search goes on with probability `patience`; it gives up after MAX_TRIES or where the budget ends, with a
        shown candidate for an answer, and never shows more than the budget holds."""
        def search(n, budget, patience):
            parts, up = selfplay.shown_search([["12"]] * n, ["34"], budget, random.Random(0), patience)
            return parts.count(selfplay.TRY), up
        self.assertEqual(search(3, 99, 1.0), (4, False))
        self.assertEqual(search(3, 99, 0.0), (1, True))
        self.assertEqual(search(0, 99, 0.0), (1, False))
        self.assertEqual(search(selfplay.MAX_TRIES, 99, 1.0), (selfplay.MAX_TRIES, True))
        self.assertEqual(search(3, 6, 1.0), (2, True))

    def test_wrong_tries_are_wrong_and_not_imitated(self):
        """In a demonstrated search no wrong try gives the output, its candidate has no weight, its check has; who gives
        up answers with the last try shown, without weight; a right candidate and its verdict weigh DECISIVE."""
        demos, _ = selfplay.demonstrations(self.ex, random.Random(5), 1500, SMALL)
        gave_up = 0
        for prompt, reply, w in demos:
            kind = decode(prompt[:1])[2:-2].split("_")[1]
            if prompt[0] != ID[f"<|solve_{kind}|>"] or kind == "deduction":
                continue
            bounds = [i for i, t in enumerate(reply) if t in (selfplay.TRY, ANSWER)] + [len(reply) - 1]
            tries, answer = [(a, b) for a, b in zip(bounds, bounds[1:])][:-1], reply[bounds[-2] + 1:-1]
            for a, b in tries:
                right, text = reply[b - 1] == selfplay.RIGHT, reply[a + 1:b - 1]
                if kind == "abduction":
                    i = text.index(selfplay.INPUT)
                    arg = decode(text[i + 1:]).split("\n    ")[0]
                    self.assertEqual(w[a + 1 + i + 1], selfplay.DECISIVE * right)
                    program = decode(prompt).split("<|program|>")[1].split("<|output|>")[0]
                    want = decode(prompt).split("<|output|>")[1].split("<|think|>")[0]
                    got, = self.ex.run([(program, arg)], False)
                    self.assertEqual(got.value == want, right)
                    last = arg
                else:
                    self.assertEqual(w[a + 1], int(right), "the line of a wrong program")
                    last = "def f(x):" + "".join("\n    " + line.split("  # ")[0]
                                                 for line in decode(text).split("\n    ")[1:]) + "\n    return x"
            if not tries or reply[tries[-1][1] - 1] == selfplay.RIGHT:
                self.assertGreater(min(w[bounds[-2] + 1:]), 0)
            else:
                gave_up += 1
                self.assertEqual(set(w[bounds[-2] + 1:-1]), {0})
                self.assertEqual(decode(answer), last)
        self.assertGreater(gave_up, 20)

    def test_each_operation_counts(self):
        """A drawn program repeats no line, and each operation changes the value of the first input."""
        draws, _ = selfplay.draw_programs(self.ex, random.Random(4), [4, 5, 6] * 40)
        for d in draws:
            self.assertEqual(len(set(d.lines)), len(d.lines))
            path = [d.inputs[0]] + [v for _, v in d.traces[0][0]]
            self.assertTrue(all(a != b for a, b in zip(path, path[1:])), (path, d.program))

    def test_an_empty_section_is_one(self):
        """An empty message, or answer, is there; it is not missing."""
        I, M = selfplay.INPUT, selfplay.MESSAGE
        self.assertEqual(selfplay.parse_proposal("induction", [I, *encode("1"), I, *encode("2"), M, END], 2),
                         (None, ["1", "2"], ""))
        self.assertEqual(selfplay.parse_answer([ANSWER, END]), "")

    def test_samples_are_drawn(self):
        """Tasks of a buffer are drawn from all of it, each equally often, none twice."""
        rng, seen = random.Random(0), Counter()
        for _ in range(600):
            got = selfplay.sample(collections.deque(range(6)), 2, rng)
            self.assertEqual(len(set(got)), 2)
            seen.update(got)
        self.assertTrue(all(150 < n < 250 for n in seen.values()) and len(seen) == 6, seen)

    def test_depths_of_the_warm_up(self):
        """The solver's demonstrations: each depth a quarter as frequent as the one before."""
        rng = random.Random(0)
        depths = Counter(selfplay.solver_depth(rng) for _ in range(20_000))
        self.assertAlmostEqual(depths[2] / depths[1], 0.25, delta=0.02)
        self.assertLessEqual(max(depths), selfplay.MAX_DEPTH)

    def test_demonstrations_earn_full_reward(self):
        """Render, parse, judge round trip in all six cells: a demonstrated reply parses, and those that do not give
        up are right; every reply fits the format that self-play rewards."""
        demos, _ = selfplay.demonstrations(self.ex, random.Random(0), 400, SMALL)
        seen = set()
        for prompt, reply, mask in demos:
            role, kind = decode(prompt[:1])[2:-2].split("_")
            seen.add((role, kind))
            self.assertEqual(len(reply), len(mask))
            self.assertEqual(mask[-1], 1, "the end token must be learnt")
            for i, t in enumerate(reply):                # verdicts weigh more, and what fails is never imitated
                if t in (selfplay.RIGHT, selfplay.WRONG):
                    self.assertEqual(mask[i], selfplay.DECISIVE)
            if kind == "abduction" and reply.count(selfplay.WRONG):
                self.assertEqual(mask[reply.index(selfplay.TRY) + 1], 0, decode(reply))
            if role == "propose":
                self.assertIsNotNone(selfplay.parse_proposal(kind, reply, SMALL.n_inputs), decode(reply))
            else:
                self.assertIsNotNone(selfplay.parse_answer(reply), decode(reply))
        self.assertEqual(len(seen), 6)

    def test_labelled_control(self):
        """RL and supervised learning on a fixed set read the same prompts, and every gold reply is judged right."""
        cfg, _ = train.parse(["--preset", "smoke", "--fixed_tasks", "60", "--proposer", "fixed", "--depths", "rare"])
        tasks = train.fixed_set(cfg, self.ex, set())
        for cfg.learner in ("supervised", "worked"):
            demos = train.fixed_set(cfg, self.ex, set())
            self.assertGreater(len(demos), 0.9 * len(tasks))  # a long thought may not fit
            right = {tuple(selfplay.solve_prompt(t)): t for t in tasks}
            verdicts = selfplay.judge_answers(self.ex, [right[tuple(p)] for p, _, _ in demos],
                                              [selfplay.parse_answer(reply) for _, reply, _ in demos])
            self.assertEqual(set(verdicts), {"right"})
            thought = [reply.index(selfplay.ANSWER) > 0 for _, reply, _ in demos]
            self.assertEqual(set(thought), {cfg.learner == "worked"})
        cfg.block_size = 8
        self.assertIn("fits --block_size", refusal(self, train.fixed_set, cfg, self.ex, set()))

    def test_gold_answers_are_right(self):
        """The generator's own answers are judged right, and another value wrong, for every kind and depth."""
        for kind in KINDS:
            draws, _ = selfplay.draw_programs(self.ex, random.Random(kind), [1, 2, 3, 4, 5, 6],
                                              4 if kind == "induction" else 1)
            for d in draws:
                task = self.task(kind, d.program, d.inputs)
                gold = {"deduction": task.outputs[0], "abduction": d.inputs[0], "induction": d.program}[kind]
                self.assertEqual(self.verdict(task, gold), "right", (kind, d.program))
                self.assertEqual(self.verdict(task, str((1, 'no', *range(11)))),
                                 "unparsable" if kind == "induction" else "wrong")

    def test_near_misses_are_near(self):
        """A near miss is one slip away: the same type, at most one element more, less or other."""
        rng = random.Random(6)
        for kind in ("int", "str", "list"):
            for _ in range(300):
                value = selfplay.random_value(rng, kind)
                near = selfplay.near_miss(rng, value)
                self.assertIs(type(near), type(value))
                if kind != "int":
                    self.assertLessEqual(abs(len(near) - len(value)), 1)
                    k = next((i for i, (a, b) in enumerate(zip(value, near)) if a != b), min(len(value), len(near)))
                    self.assertTrue(value[k + 1:] == near[k + 1:] or value[k:] == near[k + 1:]
                                    or value[k + 1:] == near[k:], (value, near))

    def test_any_input_that_fits(self):
        """Abduction takes any input with the right output, not only the proposer's."""
        task = self.task("abduction", "def f(x):\n    return len(x)", ["[1, 2]"])
        self.assertEqual(self.verdict(task, "'ab'"), "right")
        self.assertEqual(self.verdict(task, "'abc'"), "wrong")

    def test_hidden_half_decides(self):
        """Induction: a program that memorises the shown pairs is wrong; one that errs only on a shown pair is right."""
        task = self.task("induction", "def f(x):\n    return x * 2", ["1", "2", "5", "7"])
        self.assertEqual(self.verdict(task, "def f(x):\n    return {1: 2, 2: 4}.get(x)"), "wrong")
        self.assertEqual(self.verdict(task, "def f(x):\n    return x * 2 if x > 1 else 0"), "right")

    def test_no_free_lunch(self):
        """Answers that game a looser judge fail: friendly __eq__, expressions, a closed bracket, True for 1, the call
        itself."""
        ded = self.task("deduction", "def f(x):\n    return x - 3", ["4"])
        for answer in ("True", "1.0", "f(4)", "4 - 3", "", "1; 2"):
            self.assertNotEqual(self.verdict(ded, answer), "right", answer)
        self.assertEqual(self.verdict(ded, " 1 "), "right")
        abd = self.task("abduction", "def f(x):\n    return [x]", ["4"])
        for answer in ("4) or (2", "type('E', (), {'__eq__': lambda a, b: True})()", "2 + 2", "x"):
            self.assertNotEqual(self.verdict(abd, answer), "right", answer)
        pair = self.task("abduction", "def f(x):\n    return [1], [2]", ["4"])
        self.assertEqual(self.verdict(pair, "1], [2"), "unparsable")    # the brackets that are put around it, closed
        with self.assertRaises(ValueError):                             # a task that was never run has no keys
            self.verdict(replace(ded, keys=[]), "5")
        ind = self.task("induction", inputs=["1", "2", "3", "4"])
        evil = "class E:\n    def __eq__(s, o): return True\ndef f(x): return E()"
        self.assertEqual(self.verdict(ind, evil), "wrong")

    def test_reward_table(self):
        """Every line of the reward table (Eqs. 4-6), with each switch."""
        p = selfplay.propose_reward
        self.assertEqual([p("unparsable", -1), p("known", -1), p("ValueError", -1)], [-1, -1, -1])
        self.assertEqual([p("valid", r) for r in (0.0, 0.125, 0.5, 0.875, 1.0)], [0, 0.875, 0.5, 0.125, 0])
        self.assertEqual([p("valid", r, zero=-0.5) for r in (0.0, 1.0)], [-0.5, -0.5])
        self.assertEqual([p("valid", r, "uncertainty") for r in (0.0, 0.25, 0.5)], [0, 0.5, 1])
        self.assertEqual([p("valid", 0.0, "valid"), p("unparsable", -1, "none")], [1, 0])
        with self.assertRaisesRegex(AssertionError, "never tried"):
            p("valid", -1.0)                         # 1 - (-1) = 2 would be the best reward of all
        self.assertEqual(selfplay.SOLVE_REWARD, {"right": 1.0, "wrong": -0.5, "unparsable": -1.0})

    def test_malformed_replies(self):
        """Each malformed reply is unparsable: no end, two answers, none, text after, wrong sections, wrong count of
        inputs."""
        A, P, I, M = selfplay.ANSWER, selfplay.PROGRAM, selfplay.INPUT, selfplay.MESSAGE
        e = encode
        for reply in ([], [A, *e("1")], [*e("1"), END], [A, *e("1"), A, *e("1"), END],
                      [A, *e("1"), I, *e("2"), END], [END]):
            self.assertIsNone(selfplay.parse_answer(reply))
        self.assertEqual(selfplay.parse_answer([*e("thought"), A, *e("1"), END]), "1")
        for reply in ([P, *e("p"), END], [I, *e("1"), P, *e("p"), END], [*e("hm"), P, *e("p"), I, *e("1"), END],
                      [P, *e("p"), I, *e("1")], [P, *e("p"), I, *e("1"), I, *e("2"), END]):
            self.assertIsNone(selfplay.parse_proposal("deduction", reply, 2))
        self.assertEqual(selfplay.parse_proposal("deduction", [P, *e("p"), I, *e("1"), END], 2), ("p", ["1"], ""))
        self.assertIsNone(selfplay.parse_proposal("induction", [I, *e("1"), M, *e(" m"), END], 2))
        self.assertEqual(selfplay.parse_proposal("induction", [I, *e("1"), I, *e("2"), M, *e(" m"), END], 2),
                         (None, ["1", "2"], " m"))

    def test_fuzzed_replies(self):
        """100,000 random and mutated replies raise nothing and parse to text or None."""
        rng = random.Random(0)
        seeds = [r for _, r, _ in selfplay.demonstrations(self.ex, rng, 60, SMALL)[0]]
        for n in range(100_000):
            if n % 2:
                reply = [rng.randrange(network.VOCAB_SIZE) for _ in range(rng.randrange(12))]
            else:
                reply = list(rng.choice(seeds))
                reply[rng.randrange(len(reply))] = rng.randrange(network.VOCAB_SIZE - 20, network.VOCAB_SIZE)
            answer = selfplay.parse_answer(reply)
            self.assertTrue(answer is None or isinstance(answer, str))
            for kind in ("deduction", "induction"):
                parsed = selfplay.parse_proposal(kind, reply, 4)
                self.assertTrue(parsed is None or all(isinstance(i, str) for i in parsed[1]))

    def test_validity(self):
        """What fails to run, differs between two processes, or is too long never becomes a task, and the reason is
        named."""
        bad = {"syntax": "def f(x) return x", "ZeroDivisionError": "def f(x):\n    return 1 // 0",
               "nondeterministic": "def f(x):\n    return list({'a', 'b', 'c', 'd', 'e', 'f'})",
               "timeout": "def f(x):\n    while True: pass", "no_f": "def g(x):\n    return x",
               "long output": "def f(x):\n    return 'ab' * 40"}
        made = selfplay.make_tasks(self.ex, [("deduction", p, ["1"], "") for p in bad.values()])
        self.assertEqual([why for _, why in made], list(bad))
        self.assertTrue(all(task is None for task, _ in made))
        long = "def f(x):" + "\n    x = x" * 20 + "\n    return x"
        short, fault = "def f(x):\n    return x", selfplay.fault
        self.assertEqual(fault("deduction", long, ["1"], "", 6), "long program")
        self.assertEqual(fault("deduction", short, ["1" * 99], "", 6), "long input")
        self.assertEqual(fault("deduction", long, ["1" * 99], "", 0), "", "the length gate is off")
        self.assertEqual(fault("induction", short, ["1", "1"], "", 6), "same inputs")
        self.assertEqual(fault("induction", short, ["1", "2"], "x + 1", 6), "message")
        self.assertEqual(fault("induction", short, ["1", "2"], " add double", 6), "")

    def test_inputs_are_compared_by_value(self):
        """Another spelling of an input is the same input to the gates; what is no literal, or would close the bracket,
        stays as it was written, and is judged as that."""
        written = ["1 ", "[ 1,2 ]", '"a"', "1,2", "x=1", "1], [2", "1) or (2", "", " ", "2 * 3", "[1",
                   "1] # 2", "1 # 2"]
        plain = ["1", "[1, 2]", "'a'", "1, 2", "x=1", "1], [2", "1) or (2", "", "", "2 * 3", "[1", "1] # 2", "1"]
        self.assertEqual(selfplay.plain_inputs(self.ex, [("p", written, ""), None, (None, ["0x1"], " add")]),
                         [("p", plain, ""), None, (None, ["1"], " add")])
        same = "def f(x):\n    return {1: 2, 3: 4} if x else {3: 4, 1: 2}"
        self.assertEqual(selfplay.make_tasks(self.ex, [("induction", same, ["0", "1", "0", "1"], "")]),
                         [(None, "constant")])

    def test_without_the_validity_gate(self):
        """With the gate off a program that fails is a task with the output None, and None is its right answer."""
        wanted = [("deduction", "def f(x):\n    return 1 // 0", ["1"], "")]
        (task, why), = selfplay.make_tasks(self.ex, wanted, gate=False)
        self.assertEqual((why, task.outputs), ("", ["None"]))
        self.assertEqual(selfplay.judge_answers(self.ex, [task] * 2, ["None", "0"]), ["right", "wrong"])

    def test_buffer_keeps_newest(self):
        """A full buffer drops its oldest entries; the authors' code dropped the new ones and froze."""
        b = selfplay.seed_buffers(self.ex, 3, 4)["deduction"]
        for i in range(5):
            b.append(i)
        self.assertEqual(list(b), [2, 3, 4])
        self.assertEqual(len(selfplay.sample(b, 9, random.Random(0))), 3)

    def test_trace_is_what_runs(self):
        """The recorded trace's last value is the program's own output, loops and branches included."""
        draws, _ = selfplay.draw_programs(self.ex, random.Random(1), [1, 2, 3, 4] * 10, 1, large=True)
        outs = self.ex.run([(d.program, d.inputs[0]) for d in draws])
        self.assertEqual([o.value for o in outs], [d.traces[0][1] for d in draws])

    def test_traces_of_any_character(self):
        """An operation that a reader adds may write quotes, bars, backslashes, tabs: traces hold the values as repr
        writes them, as plain execution gives them."""
        lines = [f"x = x + {text!r}" for text in ("'", '"', "|", "\\", "\t", ":", "\u00e9")]
        for some in ([line] for line in lines), itertools.permutations(lines, 2):
            for program in map(selfplay.join_program, [["\n    " + line for line in mine] for mine in some]):
                result, = self.ex.run([(selfplay.traced(program), "'a'")], check=False)
                space, x = {}, "a"
                steps, final = selfplay.read_trace(program, result)
                for line, value in steps:
                    space["x"] = x
                    exec(line, space)
                    x = space["x"]
                    self.assertEqual(value, repr(x))
                self.assertEqual((len(steps), final), (program.count("\n") - 1, repr(x)))

    def test_thoughts_backwards_lead_to_the_input(self):
        """Each line of a backward thought, run on the value written behind it, gives the value it came from."""
        draws, _ = selfplay.draw_programs(self.ex, random.Random(3), [1, 2, 3, 4, 5] * 6, large=True)
        for d in draws:
            lines = decode(selfplay.think_back(d.inputs[0], d.traces[0][0])).split("\n    ")[1:]
            pairs = [line.split("  # from ") for line in lines]
            self.assertEqual(pairs[-1][1], d.inputs[0])
            values = [d.traces[0][1]] + [v for _, v in pairs]         # later value, then the one it came from
            if any("y" in line or "v in range" in line for line, _ in pairs):
                continue                                             # a block's lines do not stand alone
            for (line, before), after in zip(pairs, values):
                got, = self.ex.run([(f"def f(x):\n    {line}\n    return x", before)])
                self.assertEqual(got.value, after)

    def test_hasty_demonstrations(self):
        """`hasty` is the share of deduction's demonstrations that answer without a thought; the other kinds think."""
        cfg = SimpleNamespace(**{**vars(SMALL), "hasty": 0.6})
        demos, _ = selfplay.demonstrations(self.ex, random.Random(1), 1500, cfg)
        for kind in KINDS:
            replies = [r for p, r, _ in demos if p[0] == ID[f"<|solve_{kind}|>"]]
            self.assertAlmostEqual(sum(r[0] == selfplay.ANSWER for r in replies) / len(replies),
                                   0.6 if kind == "deduction" else 0, delta=0.08)

    def test_timid_demonstrations(self):
        """`timid`: nine in ten demonstrated proposals have one operation, without it six in twenty-one."""
        ids = [ID[f"<|propose_{k}|>"] for k in ("deduction", "abduction")]
        for timid, share in ((True, 0.9), (False, 6 / 21)):
            cfg = SimpleNamespace(**{**vars(SMALL), "timid": timid})
            demos, _ = selfplay.demonstrations(self.ex, random.Random(1), 2000, cfg)
            one = [selfplay.parse_proposal("deduction", r, 0)[0].count("\n") == 2 for p, r, _ in demos if p[0] in ids]
            self.assertAlmostEqual(float(np.mean(one)), share, delta=0.08)

    def test_few_references_are_demonstrated(self):
        """A buffer begins with one task, so with K > 2 the warm-up shows prompts of 1 to K; none where K is 0."""
        ids = [ID[f"<|propose_{k}|>"] for k in ("deduction", "abduction")]
        for k, shown in ((0, {0}), (2, {2}), (4, {1, 2, 3, 4})):
            cfg = SimpleNamespace(**{**vars(SMALL), "references": k})
            demos, _ = selfplay.demonstrations(self.ex, random.Random(1), 400, cfg)
            self.assertEqual({p.count(selfplay.PROGRAM) for p, _, _ in demos if p[0] in ids}, shown)

    def test_seeding_says_when_nothing_comes(self):
        """A start network that proposes nothing valid is said aloud: a run would only look as if it played."""
        identity = selfplay.seed_buffers(self.ex, 9, 6)["deduction"][0]
        many = [selfplay.Rollout("propose", k, [], [], [], replace(identity, kind=k)) for k in KINDS]
        for seed_tasks, tasks, each, said in ((16, 64, [], True), (1, 64, [], False), (999, 1, many, False)):
            out = io.StringIO()
            with unittest.mock.patch.object(train, "propose", return_value=each), contextlib.redirect_stdout(out):
                game = train.seeded(train.Config(seed_tasks=seed_tasks, tasks=tasks), None, self.ex, set())
            self.assertEqual("warning" in out.getvalue(), said)
            self.assertEqual(game.known, {identity.program}, "which is not new: it is there from the start")

    def test_banned_never_drawn(self):
        """No held-out pair, and from depth 2 on no held-out program, is ever drawn for the warm-up."""
        draws, _ = selfplay.draw_programs(self.ex, random.Random(2), [1, 2] * 40)
        tasks = [Task("deduction", d.program, d.inputs, [], [], depth=len(d.lines)) for d in draws]
        banned = selfplay.ban(tasks)
        again, hits = selfplay.draw_programs(self.ex, random.Random(2), [1, 2] * 40, banned=banned)
        self.assertGreater(hits, 0)
        self.assertFalse(any(selfplay.is_banned(d.program, d.inputs, banned) for d in again))

    def test_banned_never_demonstrated(self):
        """Nor do the wrong tries of demonstrated searches hold any: neighbours of a program may be the suite's."""
        draws, _ = selfplay.draw_programs(self.ex, random.Random(3), [1, 2] * 40, 4)
        for kind, share in (("abduction", 0.02), ("induction", 0.02)):
            free = [pair for d in draws for pair in selfplay.wrong_candidates(random.Random(d.program), kind, d)]
            tasks = [Task(kind, p, [i], [], [], depth=p.count("\n") - 1) for p, i in free[::2]]
            banned = selfplay.ban(tasks)
            kept = [pair for d in draws for pair in selfplay.wrong_candidates(random.Random(d.program), kind, d, False,
                                                                              banned)]
            self.assertGreater(len(kept), share * len(free))
            self.assertEqual(kept, [pair for pair in free if not selfplay.is_banned(pair[0], [pair[1]], banned)])
            self.assertLess(len(kept), len(free))


class TestLearning(unittest.TestCase):
    def test_one_update_moves_the_right_way(self):
        """After one TRR++ update the rewarded reply is likelier and the other less likely, its end token included; in
        a copy that learns nothing (advantage 0) neither moves."""
        cfg = train.Config(device="cpu", dtype="float32", micro_tokens=512)
        for rewards, sign in (([1.0, -0.5], 1), ([-0.5, 1.0], -1), ([1.0, 1.0], 0)):
            model = small_model(9)
            prompt = encode("def f(x):")
            replies, logps = generate(model, [prompt], 20, tries=2, seed=3)
            rollouts = [selfplay.Rollout("solve", "deduction", prompt, r, lp, reward=w)
                        for r, lp, w in zip(replies, logps, rewards)]

            def totals():
                idx = pad_rows([prompt + r for r in replies])
                mask = torch.zeros_like(idx, dtype=torch.bool)
                for i, r in enumerate(replies):
                    mask[i, len(prompt):len(prompt) + len(r)] = True
                lp, _ = logprobs(model, idx, mask)
                return [x.sum().item() for x in lp.split([len(r) for r in replies])]
            before = totals()
            opts = [torch.optim.SGD(model.parameters(), lr=0.05)]
            train.learn(cfg, model, opts, rollouts, advantages(rewards, ["s"] * 2), random.Random(0))
            after = totals()
            if sign:
                self.assertGreater(sign * (after[0] - before[0]), 0)
                self.assertLess(sign * (after[1] - before[1]), 0)
            else:
                self.assertEqual(before, after)

    def test_kl_is_that_of_the_update(self):
        """An update that moves nothing has a KL of 0, whatever log-probs the sampler left, and one that moves has more;
        the mismatch is 0 for the sampler's own log-probs and not for others'."""
        cfg, found = train.Config(device="cpu", dtype="bfloat16", micro_tokens=512), []
        for lr, own in ((0.0, False), (0.05, True)):
            model = small_model(9)
            (reply,), (logp,) = generate(model, [[1, 2]], 9, dtype="bfloat16")
            r = selfplay.Rollout("solve", "deduction", [1, 2], reply, logp if own else [-1.0] * len(reply))
            opts = [torch.optim.SGD(model.parameters(), lr=lr)]
            found.append(train.learn(cfg, model, opts, [r], torch.ones(1), random.Random(0)))
        self.assertEqual(found[0]["kl_after"], 0)
        self.assertGreater(found[0]["mismatch"], 1e-3)
        self.assertGreater(found[1]["kl_after"], 1e-6)
        self.assertLess(found[1]["mismatch"], 1e-6)
        change = 1e-6 * torch.randn(1000, generator=torch.Generator().manual_seed(0))
        small = train.kl(torch.zeros(1000), change)                # of which float32 would see nothing but rounding
        self.assertAlmostEqual(small / float(change.square().mean() / 2), 1, places=2)

    def test_a_base_is_named_after_all_that_makes_it(self):
        """Another vocabulary, grammar, gradient or specification of sampling names another base, for its figures would
        be others; what only self-play uses, or only makes sampling fast, does not."""
        cfg, another = train.parse(["--device", "cpu"])[0], small_model       # any function
        key = train.base_key(cfg)
        self.assertEqual(key, train.base_key(replace(cfg, lr=1.0, steps=9)))
        self.assertNotEqual(key, train.base_key(replace(cfg, warmup_lr=1.0)))
        for module, name, value, same in (
                (network, "pick", another, False), (network, "generate_naive", another, False),
                (network, "encode", another, False), (network, "pad_rows", another, False),
                (train, "accumulate", another, False), (train, "demo_loss", another, False),
                (selfplay, "ASSIGN", re.compile(selfplay.ASSIGN.pattern), False), (selfplay, "GUESSES", (1, 1), False),
                (network, "generate", another, True), (network, "_decode", another, True),
                (train, "learn", another, True), (selfplay, "propose_reward", another, True)):
            with self.subTest(name), unittest.mock.patch.object(module, name, value):
                self.assertEqual(key == train.base_key(cfg), same)

    def test_the_batch_has_no_task_twice(self):
        """Fresh tasks first, then learnable ones of the buffer (or any), then any: each once, as many as there are."""
        def task(i, rate):
            return selfplay.Task("deduction", f"p{i}", ["1"], ["1"], ["1"], rate=rate)
        old, fresh = [task(i, (0, 0.5, 1)[i % 3]) for i in range(30)], [task(i, -1.0) for i in range(90, 94)]
        game = train.Game({"deduction": collections.deque(old)}, set())
        for fill, least, tasks in (("learnable", 10, 8), ("learnable", 5, 3), ("uniform", 0, 8)):
            cfg = train.Config(kinds="deduction", tasks=tasks, fill=fill)
            got = train.choose_tasks(cfg, game, fresh, random.Random(tasks))
            self.assertEqual(got[:4], fresh)
            self.assertEqual(len({t.program for t in got}), 3 * tasks)        # the places of the kinds left out, too
            self.assertGreaterEqual(sum(t.rate == 0.5 for t in got), least)
        self.assertEqual(len(train.choose_tasks(train.Config(kinds="deduction"), game, fresh, random.Random(1))), 34)

    def test_sharpness_has_a_rate_of_its_own(self):
        """In self-play sharp_lr moves the scale of the logits and nothing else; at 0 the scale stands still."""
        cfg = train.Config(device="cpu", dtype="float32", micro_tokens=512)
        for lr, sharp_lr in ((0.0, 0.01), (0.01, 0.0)):
            model, (prompt, reply) = small_model(9), ([1, 2], [3, END])
            before = {k: v.clone() for k, v in model.state_dict().items()}
            r = selfplay.Rollout("solve", "deduction", prompt, reply, [-1.0, -1.0])
            train.learn(cfg, model, train.make_optimizers(model, False, 0.0, lr, 0.99, 1e-3, sharp_lr), [r],
                        torch.ones(1), random.Random(0))
            moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
            self.assertEqual("sharpness" in moved, sharp_lr > 0)
            self.assertEqual(bool(moved - {"sharpness"}), lr > 0)

    def test_end_token_has_gradient(self):
        """The end token is learnt and padding is not: pad and end are different ids, and the mask covers the end."""
        self.assertNotEqual(PAD, END)
        cfg = train.Config(device="cpu", micro_tokens=512)
        r = selfplay.Rollout("solve", "deduction", [1, 2], [3, END], [-1.0, -1.0])
        (idx, tree, mask, old, adv, norm), = train.rollout_batches([r], torch.ones(1), cfg)
        self.assertEqual(idx[tree[2] > 0].tolist(), [3, END])
        self.assertEqual((norm, mask.sum().item()), (2, 2))

    def test_norm_and_its_gradient(self):
        """The normalisation whose gradient is written by hand is torch's, forwards and backwards."""
        x, w = torch.randn(3, 2, 8).double().requires_grad_(), torch.randn(8).double().requires_grad_()
        self.assertTrue(torch.autograd.gradcheck(lambda x, w: network.RMSNormGrad.apply(x, w, 1e-2), (x, w)))
        gap = network.RMSNormGrad.apply(x, w, 1e-6) - torch.nn.functional.rms_norm(x, (8,), w, 1e-6)
        self.assertLess(gap.abs().max().item(), 1e-9)

    def test_micro_batches_and_threads_give_one_gradient(self):
        """The gradient does not depend on how rollouts are packed or on the number of threads, beyond rounding."""
        model, grads = small_model(FRESH), []
        demos, _ = selfplay.demonstrations(TestLearning.ex, random.Random(FRESH), 12, SMALL)
        demos = [d for d in demos if len(d[0]) + len(d[1]) <= 96]
        for budget, threads in ((100_000, 1), (200, 1), (200, 2)):
            cfg, network.THREADS = train.Config(device="cpu", micro_tokens=budget), threads
            train.accumulate(model, train.demo_batches(demos, cfg), train.demo_loss, "float32")
            grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        for g in grads[1:]:
            self.assertLess((g - grads[0]).abs().max().item(), 1e-4 * grads[0].abs().max().item() + 1e-6)

    def test_buckets_are_even(self):
        """Micro-batches hold each row once, are no more than asked for, and a smaller largest one would need more."""
        rng = random.Random(FRESH)
        for count in (1, 2, 7, 24):
            lengths = [rng.randint(1, 300) for _ in range(rng.randint(1, 60))]
            parts = train.buckets(lengths, count)
            width = {i: -(-n // 8) * 8 for i, n in enumerate(lengths)}
            self.assertEqual(sorted(sum(parts, [])), list(range(len(lengths))))
            self.assertLessEqual(len(parts), count)
            largest, needed, size = max(max(width[i] for i in p) * len(p) for p in parts), 0, 0
            for i in sorted(width, key=width.get):        # parts of less than the largest: how many would it take?
                size += 1
                if not needed or width[i] * size >= largest:
                    needed, size = needed + 1, 1
            self.assertTrue(needed > count or largest <= max(width.values()) or len(parts) == len(lengths))
        self.assertEqual(train.buckets([], 4), [])

    @classmethod
    def setUpClass(cls):
        cls.ex = Executor(workers=1, timeout=0.2)
        cls.addClassCleanup(cls.ex.close)

    def test_tries_that_share_a_row(self):
        """A prompt with several replies behind it in one row gives the log-probs and the gradient of a row each."""
        model, prompts = small_model(FRESH), random_prompts(9, FRESH)
        replies, logps = generate(model, prompts, 40, tries=8, seed=FRESH)
        rollouts = [selfplay.Rollout("solve", "deduction", prompts[i // 8], r, lp)
                    for i, (r, lp) in enumerate(zip(replies, logps))]
        random.Random(0).shuffle(rollouts)
        cfg, adv, grads, cells = train.Config(device="cpu", micro_tokens=1000), torch.randn(len(rollouts)), [], []
        for longest in (0, 100, 10_000):
            batches = train.rollout_batches(rollouts, adv, cfg, longest)
            stats = train.accumulate(model, batches, lambda m, b: train.rollout_loss(m, b, cfg), "float32")
            gap = train.log_probs(cfg, model, batches) - torch.cat([old[mask] for _, _, mask, old, *_ in batches])
            self.assertLess(gap.abs().max().item(), 1e-3, "not the sampler's log-probs")
            self.assertEqual(sum(float(s["tokens"]) for s in stats), sum(map(len, replies)))
            grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
            cells.append(sum(b[0].numel() for b in batches))
        self.assertLess(cells[2], cells[0])
        for g in grads[1:]:
            self.assertLess((g - grads[0]).abs().max().item(), 1e-4 * grads[0].abs().max().item() + 1e-6)

    def test_overfits_one_demonstration(self):
        """The warm-up's loss on one fixed demonstration falls to almost nothing."""
        model, cfg = small_model(11, block_size=160), train.Config(device="cpu", micro_tokens=4096)
        demos = [d for d in selfplay.demonstrations(self.ex, random.Random(5), 30, SMALL)[0] if len(d[1]) < 40][:1]
        opts = train.make_optimizers(model, True, 0.02, 0.01)
        for _ in range(60):
            loss = sum(s["loss"] for s in train.accumulate(
                model, train.demo_batches(demos, cfg), train.demo_loss, "float32"))
            for o in opts:
                o.step()
        self.assertLess(loss.item(), 0.1)


class PretendCUDA(torch.overrides.TorchFunctionMode):
    """A GPU for machines without one: tensors stay where they are, but each knows (x.gpu) whether it would be on it,
    and what mixes the devices fails as it would there. So the code for CUDA runs, and is checked, on every machine."""
    MAY_MIX = ("copy_", "__setitem__", "__deepcopy__", "_has_compatible_shallow_copy_type")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, args, kwargs, target = func.__name__, list(args), dict(kwargs or {}), None
        if name in ("__get__", "__set__"):                           # x.device, x.is_cuda, x.data, x.data = y
            field, x = func.__self__.__name__, args[0]
            if field in ("device", "is_cuda") and on_gpu(x):
                return torch.device("cuda", 0) if field == "device" else True
            out = func(*args, **kwargs)
            if name == "__set__" and field == "data":
                x.gpu = on_gpu(args[1])
            elif isinstance(out, torch.Tensor) and field != "grad":  # x.T and the like
                out.gpu = on_gpu(x)
            return out
        places = [(kwargs, "device")] * ("device" in kwargs)
        places += [(args, i) for i, a in enumerate(args) if name == "to" and isinstance(a, (str, torch.device))]
        for box, key in places:
            target = None if box[key] is None else "cuda" in str(box[key])
            box[key] = "cpu"
        mine = tensors([args, kwargs])
        if len({on_gpu(t) for t in mine if t.dim()}) > 1 and name not in self.MAY_MIX \
                and not (name == "__getitem__" and on_gpu(args[0])) or name == "numpy" and on_gpu(args[0]):
            raise RuntimeError(f"{name} on two devices: {[(tuple(t.shape), on_gpu(t)) for t in mine]}")
        out = func(*args, **kwargs)
        if name == "cpu" or target is not None:
            if mine and out is mine[0] and bool(target) != on_gpu(out):
                out = out.detach().clone()
        else:                                                        # in place: where it was; else where its inputs are
            target = on_gpu(mine[0]) if name in self.MAY_MIX and mine else any(map(on_gpu, mine))
        for t in tensors(out):
            t.gpu = bool(target)
        return out


def tensors(x):
    """All tensors in nested lists, tuples and dicts."""
    if isinstance(x, torch.Tensor):
        return [x]
    x = x.values() if isinstance(x, dict) else x
    return [t for y in x for t in tensors(y)] if isinstance(x, (list, tuple, type({}.values()))) else []


def on_gpu(t):
    return getattr(t, "gpu", False)


TINY = ["--device", "cpu", "--dtype", "float32", "--n_layer", "1", "--n_embd", "32", "--n_head", "2",
        "--n_kv_head", "1", "--warmup_steps", "100", "--warmup_batch", "8", "--steps", "4", "--proposals", "4",
        "--tasks", "4", "--tries", "2", "--seed_tasks", "1", "--suite_n", "2", "--samples", "2", "--eval_every", "2",
        "--save_every", "1", "--show_every", "2", "--max_new", "48", "--block_size", "240"]


def run_train(args, log):
    """What a process of `launch` does: train.main, its output in a file, apart from the tests' terminal."""
    os.setsid()
    with open(log, "w", buffering=1, encoding="utf-8") as sys.stdout:
        sys.stderr = sys.stdout
        for file in (1, 2):                # for the processes it starts in turn
            os.dup2(sys.stdout.fileno(), file)
        tqdm.tqdm.set_lock(threading.RLock())     # its own has a semaphore, which a killed process leaves behind
        train.main(args)


def launch(test, args, log=os.devnull):
    """train.py in a process of its own that has torch imported already (3 of the 4 seconds that such a run takes)."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["torch._dynamo"])
    process = server.Process(target=run_train, args=(args, log))
    process.start()
    test.addCleanup(process.kill)
    return process


def wait_for_line(process, log, start):
    """Returns once a line of log starts so."""
    log = pathlib.Path(log)
    while not log.exists() or not re.search(rf"^{re.escape(start)}", log.read_text("utf-8"), re.MULTILINE):
        if process.exitcode is not None:
            raise AssertionError(f"it ended with {process.exitcode}: {log.read_text('utf-8')}")
        time.sleep(0.01)


def figures(folder):
    """metrics.jsonl without what a clock, or the machine's memory, decides."""
    with open(os.path.join(folder, "metrics.jsonl")) as f:
        rows = [json.loads(line) for line in f]
    clock = ("seconds", "tokens_per_s", "minutes", "memory_mb")
    return [{k: v for k, v in row.items() if k not in clock} for row in rows]


class TestTrain(unittest.TestCase):
    def test_first_the_skill_then_the_habit(self):
        """Haste and impatience begin after habits_from of the warm-up, also where it is resumed within a chunk."""
        seen = []

        def note(ex, rng, n, cfg, banned):
            seen.append((cfg.hasty, cfg.patience))
            return [], 0
        cfg, _ = train.parse([*TINY, "--warmup_steps", "250"])
        model = train.new_model(cfg)
        with tempfile.TemporaryDirectory() as out, unittest.mock.patch.object(selfplay, "demonstrations", note), \
                contextlib.redirect_stdout(io.StringIO()):
            part, opts = os.path.join(out, "part"), train.make_optimizers(model, True, 0.1, 0.1)
            train.train_base(cfg, model, None, set(), out, part)
            self.assertEqual(seen, [(0.0, 1.0)] * 3 + [(cfg.hasty, cfg.patience)] * 2)
            evaluation.save(part, {"version": evaluation.VERSION, "model": model.state_dict(), "step": 130,
                                   "seconds": 0.0, "hits": 0, "optimizers": [o.state_dict() for o in opts]})
            train.train_base(cfg, model, None, set(), out, part)
        self.assertEqual(seen[5:], seen[2:5])

    def test_bad_input(self):
        """A typo, a wrong type, an impossible combination, a missing device or folder: one line that helps, exit code
        2."""
        with tempfile.TemporaryDirectory() as tmp:
            os.makedirs(f"{tmp}/full")
            open(f"{tmp}/full/x", "w").close()
            cases = [(["--stepz", "3"], "did you mean --steps"), (["--steps", "many"], "--steps: invalid int value"),
                     (["--preset", "huge"], "smoke"), (["--ablation", "nope"], "solver_only"),
                     (["--advantage", "gae"], "trr, group"), (["--n_head", "3"], "n_head"), (["--tries", "1"], "tries"),
                     (["--kinds", "deduction,poetry"], "induction"), (["--lr", "nan"], "a number from 0"),
                     (["--learner", "supervised"], "fixed"), (["--out", f"{tmp}/full"], "not empty"),
                     (["--resume", f"{tmp}/none"], "no run to resume"), (["--max_new", "500"], "block_size"),
                     (["--preset", "gpu", "--ablation", "timid"], "say --steps as well"),
                     (["--block_size", "365"], "multiple of 8"),
                     (["--tasks", "20"], "lower it, or raise --tasks"), (["--lr", "-1"], "from 0 to"),
                     (["--learn_tries", "9"], "more than --tries"), (["--resume_", "x"], "unknown flag"),
                     (["--seed", "9" * 20], "from 0 to"), (["--adam_eps", "0"], "from 1e-30"),
                     (["--adam_eps", "1e-50"], "from 1e-30"), (["--zero_reward", "nan"], "a number from -"),
                     (["--out", ""], "name of a folder"), (["--resume", ""], "name of a folder"),
                     (["--seeds", "0"], "at least 1"), (["--resume", "x", "--seeds", "2"], "no other flag"),
                     (["--large", "maybe"], "true_or_false"), (["--out", "/proc/x/y"], "give another --out"),
                     (["--out", "x" * 300], "give another --out"),
                     (["--n_inputs", "2"], "from 3 to 10"), (["--steps", "0"], "from 1 to"),
                     (["--advantage", "group", "--learn_tries", "1"], "nothing to compare"),
                     (["--suite_n", "10001"], "from 1 to 10000"),
                     (["--seeds", "1", "--name", "x"], "names of their own"),
                     (["--kinds", "induction"], "describes programs"), ([f"--resume={tmp}", "--lr=1"], "no other flag")]
            if not torch.cuda.is_available():
                cases.append((["--device", "cuda"], "no CUDA device"))
            for args, words in cases:
                with self.subTest(args):
                    self.assertIn(words, refusal(self, train.main, args))

    def test_what_is_printed(self):
        """--help names every flag and fits 80 columns; no control character of a model's reaches the terminal."""
        with contextlib.redirect_stdout(io.StringIO()) as printed, self.assertRaises(SystemExit), \
                unittest.mock.patch.dict(os.environ, COLUMNS="80"):
            train.main(["--help"])
        lines = printed.getvalue().split("\n")
        self.assertLess(max(map(len, lines)), 80)
        for flag in (*asdict(train.Config()), "preset", "ablation", "seeds", "out", "resume"):
            self.assertEqual(sum(line.startswith(f"  --{flag} ") for line in lines), 1, flag)
        text = train.rollout_text(selfplay.Rollout("solve", "deduction", encode("x\n"), encode("\x1b[2J\x00\x9b"), []))
        self.assertIn("x\n\n  -> \\u001b[2J\\u0000\\u009b\n", text)

    @only_one_of_the_people
    def test_switches_run(self):
        """Each way to propose, fill, reward and learn runs a step to its end, also those that no other test switches
        on."""
        with tempfile.TemporaryDirectory() as tmp, contextlib.redirect_stdout(io.StringIO()):
            for i, flags in enumerate(("--ablation paper_batch --average sequence --token_whiten true",
                                       "--ablation no_length_gate --epochs 2 --minibatches 2 --optimizer muon",
                                       "--ablation authors_code --proposer frozen --proposer_reward uncertainty",
                                       "--ablation random_shallow --kinds induction --validity_gate false "
                                       "--skip_flat false",
                                       "--ablation no_references --proposer_reward valid --advantage none",
                                       "--ablation worked_10k --fixed_tasks 9 --steps 2")):
                train.main(["--out", f"{tmp}/{i}", *TINY, "--warmup_steps", "2", "--steps", "1", "--suite_n", "1",
                            "--samples", "1", "--eval_every", "0", *flags.split()])
                with open(f"{tmp}/{i}/metrics.jsonl") as f:
                    row = json.loads(f.readlines()[-1])
                self.assertTrue(math.isfinite(row.get("kl", row.get("loss")) + row["grad_norm"]), flags)

    @only_one_of_the_people
    def test_what_is_learnt_from(self):
        """Flat tasks, the proposer's rollouts, the weight of its advantages and of negative ones: each switch acts.
        This network solves nothing, so every reward is -1 and with advantage none so is every advantage."""
        seen = []
        learn = unittest.mock.patch.object(train, "learn", lambda *a: seen.append(a[3:5]) or Counter())
        with tempfile.TemporaryDirectory() as tmp, contextlib.redirect_stdout(io.StringIO()), learn:
            for i, flags in enumerate(("", "--skip_flat false", "--skip_flat false --proposer frozen",
                                       "--propose_weight 3", "--negative 0")):
                train.main(["--out", f"{tmp}/{i}", *TINY, "--steps", "1", "--warmup_steps", "2", "--eval_every", "0",
                            "--suite_n", "1", "--advantage", "none", *flags.split()])
        roles = [[r.role for r in used] for used, _ in seen]
        self.assertEqual([(r.count("propose"), r.count("solve")) for r in roles],
                         [(12, 0), (12, 6), (0, 6), (12, 0), (12, 0)])
        self.assertEqual([set(adv.tolist()) for _, adv in seen], [{-1}, {-1}, {-1}, {-3}, {0}])

    def test_minibatches(self):
        """An update has as many optimizer steps as minibatches are asked for, whatever the number of rollouts."""
        cfg, model = train.Config(device="cpu", dtype="float32", micro_tokens=512), small_model(3)
        optimizers = train.make_optimizers(model, False, 0.0, 1e-4)
        rs = [selfplay.Rollout("solve", "deduction", [1, 2], [3, END], [-2.0, -1.0]) for _ in range(9)]
        for cfg.minibatches, updates in ((1, 1), (4, 4), (9, 9), (20, 9)):
            total = train.learn(cfg, model, optimizers, rs, torch.ones(9), random.Random(0))
            self.assertEqual((total["updates"], total["tokens"]), (updates, 18))

    @only_one_of_the_people
    def test_one_try(self):
        """--learn_tries 1: all n tries measure the solve rate, and the update learns from one a task."""
        with tempfile.TemporaryDirectory() as tmp:
            seen = []
            with unittest.mock.patch.object(train, "learn", lambda *a: seen.append(a[3]) or Counter(kl_after=0.0)), \
                    contextlib.redirect_stdout(io.StringIO()):
                train.main(["--out", f"{tmp}/run", *TINY, "--steps", "1", "--warmup_steps", "2", "--skip_flat",
                            "false", "--learn_tries", "1", "--proposer", "fixed", "--fixed_tasks", "30"])
            groups = [r.group for r in seen[0]]
            self.assertEqual(sorted(groups), list(range(len(groups))))
            self.assertEqual(len(groups), 12)

    @only_one_of_the_people
    def test_no_tensor_meets_one_of_another_device(self):
        """A whole run on a pretended GPU, bfloat16 and all, then its resumption: nothing mixes devices."""
        autocast, parameter = torch.autocast, torch.nn.Parameter.__new__

        def marked(new, old):
            new.gpu = on_gpu(old)
            return new
        fakes = [(torch, "autocast", lambda device, *a, **k: autocast("cpu", *a, **k)),
                 (torch.nn.Parameter, "__new__", lambda cls, data=None, requires_grad=True: marked(
                     parameter(cls, data, requires_grad), data)),
                 (torch.cuda, "is_available", lambda: True), (torch.cuda, "is_bf16_supported", lambda **k: True),
                 (torch.cuda, "get_device_name", lambda: "pretended"), (torch.cuda, "max_memory_allocated", lambda: 0),
                 (torch.cuda, "is_current_stream_capturing", lambda: False),     # torch 2.11's optimizers ask this,
                 (torch.accelerator, "current_stream", lambda: SimpleNamespace(is_capturing=lambda: False)),  # 2.13's
                 (network, "_capture", lambda step, z: step),
                 (train, "generate", functools.partial(generate, rows=32)),
                 (evaluation, "generate", functools.partial(generate, rows=32))]
        with contextlib.ExitStack() as stack, contextlib.redirect_stdout(io.StringIO()) as said:
            tmp = stack.enter_context(tempfile.TemporaryDirectory())
            for thing, name, fake in fakes:
                stack.enter_context(unittest.mock.patch.object(thing, name, fake))
            stack.enter_context(PretendCUDA())
            torch.set_num_threads(1)
            model = small_model(1).to("cuda")
            with self.assertRaisesRegex(RuntimeError, "two devices"):
                model(torch.zeros(1, 4, dtype=torch.long))           # the pretence holds
            train.main(["--out", f"{tmp}/run", *TINY, "--device", "cuda", "--dtype", "bfloat16", "--warmup_steps", "2",
                        "--steps", "2", "--suite_n", "1", "--samples", "1", "--eval_every", "0", "--max_new", "24"])
            os.remove(f"{tmp}/run/eval.json")
            train.main(["--resume", f"{tmp}/run"])
            self.assertIn("resumed at step 2", said.getvalue())
            self.assertTrue(on_gpu(train.new_model(train.Config(device="cuda")).sharpness))

    def test_resume_equals_no_interruption(self):
        """Stopped with SIGTERM, then killed with SIGKILL, at random moments and resumed, a run with 3 executor workers
        writes the figures of one with 2 that was never disturbed."""
        with tempfile.TemporaryDirectory() as tmp:
            tiny = [*TINY, "--seed_tasks", "2"]       # which this network needs all 50 rounds for: time to be killed in
            calm = launch(self, ["--out", f"{tmp}/a/run", *tiny])
            rng, args, kills = random.Random(), ["--out", f"{tmp}/b/run", *tiny, "--workers", "3"], 0
            for attempt in range(12):
                p = launch(self, args)
                p.join(rng.uniform(0.5, 4) if attempt < 3 else 100)
                if p.exitcode is not None:
                    break
                os.kill(p.pid, signal.SIGKILL if attempt else signal.SIGTERM)
                p.join()
                kills += 1
                if os.path.exists(f"{tmp}/b/run/config.json"):
                    args = ["--resume", f"{tmp}/b/run"]
            calm.join(100)
            self.assertEqual((p.exitcode, calm.exitcode), (0, 0))
            self.assertGreater(kills, 0, "the run ended before the first kill: make it longer")
            self.kills = kills
            self.assertEqual(figures(f"{tmp}/a/run"), figures(f"{tmp}/b/run"))
            with open(f"{tmp}/a/run/eval.json") as a, open(f"{tmp}/b/run/eval.json") as b:
                a, b = json.load(a), json.load(b)
            self.assertEqual((a["base"], a["final"]), (b["base"], b["final"]))

    @unittest.skipUnless(os.environ.get("KILLS"), "a soak: KILLS=30 goes on until 30 kills are survived")
    def test_many_kills(self):
        """The same again and again."""
        survived = 0
        while survived < int(os.environ["KILLS"]):
            self.test_resume_equals_no_interruption()
            survived += self.kills
        print(f"{survived} kills survived")

    def test_signals(self):
        """Ctrl-C and SIGTERM finish the step, save, say how to go on and exit with 130 and 143; pressed twice, the run
        ends at once with its last checkpoint whole; no worker survives."""
        scratch = tempfile.TemporaryDirectory()       # one for all, so that they share the base
        self.addCleanup(scratch.cleanup)

        def case(i, number, code, times):
            out, log = f"{scratch.name}/run{i}", f"{scratch.name}/log{i}"
            p = launch(self, ["--out", out, *TINY, "--steps", "5000"], log)
            wait_for_line(p, log, "step    2/")       # the first step's checkpoint is written by then
            workers = descendants(p.pid)
            os.kill(p.pid, number)
            if times == 2:
                time.sleep(0.01)
                os.kill(p.pid, number)
            p.join(60)
            self.assertEqual(p.exitcode, code)
            if times == 1:
                self.assertIn(f"--resume {out}", pathlib.Path(log).read_text("utf-8"))
            train.load(f"{out}/ckpt.pt", ("model", "game", "step"))
            time.sleep(0.3)
            self.assertFalse([pid for pid in workers if alive(pid)])
        with ThreadPoolExecutor() as pool:            # at once: a run has one core, more or less
            list(pool.map(case, range(3), (signal.SIGINT, signal.SIGTERM, signal.SIGINT), (130, 143, 130), (1, 1, 2)))

    def test_rows_fit_their_preset(self):
        """Each row of a preset's grid parses; the ones left out are those which set what the preset sets as well."""
        for preset, left_out in (("cpu", set()), ("gpu", {"timid", "authors_code", "supervised_10k"})):
            for name, row in train.ABLATIONS.items():
                if train.clashes(row, preset, SimpleNamespace(**dict.fromkeys(row))):
                    left_out -= {name}
                    self.assertNotEqual(preset, "cpu")
                else:
                    train.parse(["--preset", preset, "--device", "cpu", "--ablation", name])
            self.assertEqual(left_out, set())

    def test_grid_is_stopped_and_goes_on(self):
        """Ctrl-C reaches the grid and its row: the row saves before both end, and the same command goes on with it."""
        with tempfile.TemporaryDirectory() as tmp:
            log, command = f"{tmp}/log", ["--ablation", "paper_batch", "--seeds", "1", "--out", f"{tmp}/grid", *TINY,
                                          "--warmup_steps", "10", "--steps", "3", "--eval_every", "0"]
            p = launch(self, command, log)
            wait_for_line(p, log, "step    1/")
            os.killpg(p.pid, signal.SIGINT)
            p.join(60)
            self.assertEqual(p.exitcode, 130)
            self.assertIn("--resume", pathlib.Path(log).read_text("utf-8"))
            p = launch(self, command, log)
            p.join(100)
            self.assertIn("resumed at step", pathlib.Path(log).read_text("utf-8"))
            with open(f"{tmp}/grid/paper_batch-s1/config.json") as f:
                self.assertFalse(json.load(f)["skip_flat"])
            self.assertTrue(os.path.exists(f"{tmp}/grid/paper_batch-s1/eval.json"))
            with contextlib.redirect_stderr(io.StringIO()) as said, self.assertRaises(SystemExit) as caught:
                train.main([*command, "--steps", "4"])
            self.assertEqual(caught.exception.code, 2, "a row of other settings is neither taken nor overwritten")
            self.assertIn("made with another --steps", said.getvalue())
            said = refusal(self, train.main, ["--ablation", "all", "--tasks", "48", "--out", f"{tmp}/other"])
            self.assertIn("--proposals 64", said)
            self.assertFalse(os.path.exists(f"{tmp}/other"), "a row that cannot run is found before the others have")

    def test_faults_are_named(self):
        """Disk full, a read-only folder, a full GPU, a killed process that draws: one line that says what to do, and
        nothing half written."""
        full, read_only = OSError(28, "No space left on device"), OSError(30, "Read-only file system")
        for fault, words in ((full, "make room"), (read_only, "make room"),
                             (torch.OutOfMemoryError("x"), "--tasks (now 4)"),
                             (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "Go on with")):
            with tempfile.TemporaryDirectory() as tmp, unittest.mock.patch.object(train, "run", side_effect=fault):
                self.assertIn(words, refusal(self, train.main, ["--out", f"{tmp}/run", *TINY]))
                self.assertEqual(sorted(os.listdir(f"{tmp}/run")), [".lock", "config.json"])
        with tempfile.TemporaryDirectory() as tmp:
            train.save(f"{tmp}/f", {"x": 1})
            with unittest.mock.patch.object(os, "fsync", side_effect=full), self.assertRaises(OSError):
                train.save(f"{tmp}/f", {"x": 2})
            self.assertEqual(torch.load(f"{tmp}/f", weights_only=True), {"x": 1})
            self.assertEqual(os.listdir(tmp), ["f"])

    def test_one_run_a_folder(self):
        """A second run on a folder that is being written is refused while the first lives, and not after."""
        with tempfile.TemporaryDirectory() as tmp:
            held = train.lock(tmp)
            refusal(self, train.lock, tmp)
            held.close()
            train.lock(tmp).close()
            with unittest.mock.patch.object(train, "run"):           # killed before it wrote anything: begun again
                train.main(["--out", tmp, *TINY])
            self.assertIn("not empty", refusal(self, train.main, ["--out", tmp, *TINY]))

    def test_nan_stops_before_the_step(self):
        """A gradient that is not finite changes no weight; the run then stops with the last good checkpoint."""
        model, cfg = small_model(12), train.Config(device="cpu", dtype="float32", micro_tokens=512)
        r = selfplay.Rollout("solve", "deduction", [1, 2], [3, END], [float("nan"), -1.0])
        before = [p.detach().clone() for p in model.parameters()]
        optimizers = train.make_optimizers(model, False, 0.0, 0.1)
        stats = train.learn(cfg, model, optimizers, [r], torch.ones(1), random.Random(0))
        self.assertTrue(all(torch.equal(a, b) for a, b in zip(before, model.parameters())))
        with tempfile.TemporaryDirectory() as tmp, contextlib.redirect_stdout(io.StringIO()), \
                unittest.mock.patch.object(train, "learn", lambda *a: stats):
            self.assertIn(f"the gradient of step 1 is not finite: lower lr (now 0.0003) in {tmp}/run/config.json",
                          refusal(self, train.main, ["--out", f"{tmp}/run", *TINY, "--warmup_steps", "2"]))

    def test_every_ablation_differs_as_named(self):
        """Each row of the ablation table is the full run but for the fields it names."""
        full = train.Config()
        for name, fields in train.ABLATIONS.items():
            cfg, _ = train.parse(["--ablation", name, "--device", "cpu"])
            for key, value in fields.items():
                self.assertEqual(getattr(cfg, key), value)
            free = {*fields, "name", "device", "dtype", "micro_tokens"}
            same = [k for k in asdict(cfg) if k not in free]
            self.assertTrue(all(getattr(cfg, k) == getattr(full, k) for k in same), name)

    def test_save_is_atomic(self):
        """A write that fails half way leaves the old file whole."""
        with tempfile.TemporaryDirectory() as tmp:
            train.save(f"{tmp}/f", "old")

            class Unwritable:
                def __reduce__(self):
                    raise RuntimeError("cannot be saved")
            with self.assertRaises(RuntimeError):
                train.save(f"{tmp}/f", {"x": Unwritable()})
            with open(f"{tmp}/f") as f:
                self.assertEqual(f.read(), "old")

    def test_what_a_checkpoint_brings_back(self):
        """A resumed run has the tasks its buffers share with the next step (previous_step), and the optimizer's moments
        under the rates of its config.json, which may have been edited; one from another base or of other parts is
        refused."""
        cfg, model = train.Config(device="cpu", dtype="float32", micro_tokens=512), small_model(3)
        base, rates = model.state_dict(), (False, 0.0, 0.1, 0.99, 1e-3, 0.01)
        optimizers = train.make_optimizers(model, *rates)
        r = selfplay.Rollout("solve", "deduction", [1, 2], [3, END], [-2.0, -1.0])
        train.learn(cfg, model, optimizers, [r], torch.ones(1), random.Random(0))
        tasks = [Task("deduction", f"p{i}", ["1"], ["1"], ["1"]) for i in range(4)]
        game = train.Game({k: collections.deque(tasks if k == "deduction" else []) for k in KINDS}, {"p1"}, 9, 1,
                          {"deduction": 2})
        with tempfile.TemporaryDirectory() as tmp:
            train.checkpoint(tmp, model, base, optimizers, game, 5, 1.5)
            other, path = train.make_optimizers(small_model(4), False, 0.0, 0.05, 0.99, 1e-8, 0.02), f"{tmp}/ckpt.pt"
            got, step, minutes = train.restore(cfg, path, small_model(4), base, other)
            said = refusal(self, train.restore, cfg, path, model, small_model(5).state_dict(), other)
            data = torch.load(path, weights_only=True)
            self.assertIn("to 5 or more", refusal(self, train.restore, replace(cfg, steps=4), path, model, base, other))
            for part, junk, words in (("model", {}, "does not fit"), ("optimizers", [], "another optimizer"),
                                      ("game", {}, "damaged"), ("base", None, "damaged"), ("step", -3, "damaged"),
                                      ("minutes", None, "damaged")):
                evaluation.save(path, {**data, part: junk})
                self.assertIn(words, refusal(self, train.restore, cfg, path, model, base, other))
        self.assertIn("another start network", said)
        self.assertEqual((got, step, minutes), (game, 5, 1.5))
        for mine, old in zip(other[0].param_groups, optimizers[0].param_groups):
            self.assertNotEqual(mine["lr"], old["lr"])
            for p, q in zip(mine["params"], old["params"]):
                self.assertTrue(torch.equal(other[0].state[p]["exp_avg"], optimizers[0].state[q]["exp_avg"]))

    def test_torn_metrics(self):
        """A half-written last line and lines past the checkpoint are dropped, the rest is kept to the letter."""
        with tempfile.TemporaryDirectory() as tmp:
            lines = [json.dumps({"phase": "selfplay", "step": s, "x": 0.1}) + "\n" for s in range(4)]
            with open(f"{tmp}/metrics.jsonl", "w") as f:
                f.write("".join(lines) + '{"phase": "selfplay", "st')
            train.rewind_metrics(tmp, "selfplay", 3)
            with open(f"{tmp}/metrics.jsonl") as f:
                self.assertEqual(f.readlines(), lines[:3])


class TestStep(unittest.TestCase):
    """Steps of self-play with invented replies, proposals or verdicts, where what must come of them is known."""
    @classmethod
    def setUpClass(cls):
        cls.ex = Executor(workers=1, timeout=0.2)
        cls.addClassCleanup(cls.ex.close)

    def propose(self, flags, replies, game=None, banned=frozenset()):
        """(proposals, game, prompts) of a sampler that writes these replies."""
        cfg, _ = train.parse([*TINY, *flags])
        game, asked = game or train.Game(selfplay.seed_buffers(self.ex, 99, cfg.n_inputs), set()), []

        def write(model, prompts, *args, **more):
            asked.extend(prompts)
            out = [replies[i % len(replies)] for i in range(len(prompts))]
            return out, [[-1.0] * len(r) for r in out]
        with unittest.mock.patch.object(train, "generate", write):
            made = train.propose(cfg, None, self.ex, game, banned, 0, random.Random(0),
                                 len(replies) // len(cfg.kinds.split(",")))
        return made, game, asked

    @staticmethod
    def plain(program, arg="4"):
        return [selfplay.PROGRAM, *encode(program), selfplay.INPUT, *encode(arg), END]

    def test_gates_of_a_proposal(self):
        """A held-out program, or its pair however the input is spelt, becomes no task and is counted; nor does a
        program that was proposed before, unless the novelty gate is off."""
        program = "def f(x):\n    x = x + 1\n    return x * 2"
        for gate, banned, whys in (("true", set(), ["valid", "known"]), ("false", set(), ["valid"] * 2),
                                   ("true", {program}, ["held out"] * 2), ("true", {(program, "4")}, ["held out"] * 2)):
            made, game, _ = self.propose(["--kinds", "deduction", "--novelty_gate", gate],
                                         [self.plain(program, "4 ")] * 2, banned=banned)
            self.assertEqual([r.verdict for r in made], whys)
            self.assertEqual([r.task is None for r in made], [why != "valid" for why in whys])
            self.assertEqual(game.held_out, whys.count("held out"))

    def test_proposals_that_fail_say_why(self):
        """A proposal that does not run, or leaves its solver no room, is no task and its verdict is the reason; without
        the length gate a long program is one."""
        long = "def f(x):" + "\n    x = x + 1" * 12 + "\n    return x"
        fails = "def f(x):\n    return x // 0"
        got, _, _ = self.propose(["--kinds", "deduction"], [self.plain(fails), self.plain(long)])
        self.assertEqual([(r.verdict, r.task) for r in got], [("ZeroDivisionError", None), ("long program", None)])
        got, _, _ = self.propose(["--kinds", "deduction", "--max_lines", "0"], [self.plain(long)])
        self.assertEqual(got[0].verdict, "valid")
        long = "def f(x):" + "\n    x = x + 1" * 60 + "\n    return x"
        got, _, _ = self.propose(["--kinds", "deduction", "--max_lines", "0"], [self.plain(long)])
        self.assertEqual(got[0].verdict, "long prompt")

    def test_induction_passes_no_novelty_gate(self):
        """Induction's proposer is given a program, known or not, of the other kinds' buffers, and makes none known."""
        I, M = selfplay.INPUT, selfplay.MESSAGE
        reply = [t for i in range(6) for t in (I, *encode(str(i)))] + [M, *encode(" add"), END]
        program, mine = "def f(x):\n    return x + 1", "def f(x):\n    return x + 2"
        task = Task("deduction", program, ["1"], ["2"], ["2"])
        game = train.Game({"deduction": collections.deque([task]), "abduction": collections.deque(),
                           "induction": collections.deque([replace(task, program=mine)])}, {program})
        got, game, asked = self.propose(["--kinds", "deduction,induction"], [reply] * 12, game)
        got, asked = got[6:], asked[6:]
        self.assertEqual({(r.verdict, r.known) for r in got}, {("valid", False)})
        self.assertEqual({decode(p).split("<|program|>")[1].split("<|")[0] for p in asked}, {program})
        game.known.clear()
        _, game, _ = self.propose(["--kinds", "deduction,induction"], [reply] * 2, game)
        self.assertEqual(game.known, set())

    def test_references_leave_room(self):
        """References are dropped until the proposer's reply fits behind them."""
        wide = Task("deduction", "def f(x):" + "\n    x = x + 1" * 12 + "\n    return x", ["1"], ["13"], ["13"])
        game = train.Game({k: collections.deque([wide] * 6) for k in KINDS}, set())
        _, _, asked = self.propose(["--kinds", "deduction", "--references", "6"], [[END]], game)
        self.assertLessEqual(max(map(len, asked)), 240 - train.PROPOSAL)

    def test_no_uniforms_are_used_twice(self):
        """Every step, phase and seed samples with uniforms of its own."""
        seeds = [train.sample_seed(SimpleNamespace(seed=seed), step, phase) for seed in (1, 2, 3)
                 for step in range(-60, 300) for phase in (0, 1)]
        self.assertEqual(len(set(seeds)), len(seeds))

    def test_fill_is_learnable_new_and_of_its_kind(self):
        """The places that fresh tasks leave go to the newest thousand's learnable ones; a kind's places to its own."""
        def task(i, rate, kind="deduction"):
            return Task(kind, f"{i}", ["1"], ["1"], ["1"], rate=rate)
        pool = [task(i, 0.5) for i in range(500)] + [task(i, 0.5 if i % 10 == 0 else i % 2) for i in range(500, 1500)]
        game = train.Game({"deduction": collections.deque(pool), "abduction": collections.deque()}, set())
        cfg = train.Config(kinds="deduction,abduction", tasks=20)
        got = train.choose_tasks(cfg, game, [task(9999, -1.0, "abduction")], random.Random(0))
        self.assertEqual([t.kind for t in got], ["deduction"] * 30 + ["abduction"])
        self.assertTrue(all(int(t.program) >= 500 and t.rate == 0.5 for t in got[:30]))

    def test_solving(self):
        """A task's rate is the share of its own tries that are right; each try has its task's number and its own
        reward."""
        (a, _), (b, _) = selfplay.make_tasks(self.ex, [("deduction", "def f(x):\n    return x", [x], "") for x in "12"])
        cfg = train.Config(tries=4, dtype="float32")
        texts = ["1", "1", "1", "2", "2", "1", "x", "1"]
        with unittest.mock.patch.object(train, "generate", lambda *args, **more: (
                [[ANSWER, *encode(t), END] for t in texts], [[0.0] * 3] * 8)):
            got = train.solve(cfg, None, self.ex, [a, b], 0)
        self.assertEqual((a.rate, b.rate), (0.75, 0.25))
        self.assertEqual([r.reward for r in got], [1, 1, 1, -0.5, 1, -0.5, -1, -0.5])
        self.assertEqual([(r.group, r.task is (a, b)[r.group]) for r in got], [(0, True)] * 4 + [(1, True)] * 4)

    def test_loss_of_packed_rollouts(self):
        """Packed in rows and micro-batches, an update's loss is policy_loss of the padded replies, for both averages;
        rows that are shared stop at their limit."""
        model, prompts = small_model(3), [[1, 2, 3], [4, 5]]
        replies, logps = network.generate(model, prompts, 40, tries=9, seed=2)
        rs = [selfplay.Rollout("solve", "deduction", prompts[i // 9], r, [x - 0.1 for x in lp])
              for i, (r, lp) in enumerate(zip(replies, logps))]
        adv = torch.randn(18)
        logp, old, mask = torch.zeros(18, 40), torch.zeros(18, 40), torch.zeros(18, 40)
        for i, (r, lp) in enumerate(zip(replies, logps)):
            logp[i, :len(r)], old[i, :len(r)], mask[i, :len(r)] = torch.tensor(lp), torch.tensor(lp) - 0.1, 1
        for average in ("token", "sequence"):
            cfg = train.Config(device="cpu", dtype="float32", micro_tokens=64, average=average)
            got = sum(train.rollout_loss(model, b, cfg)[0].item() for b in train.rollout_batches(rs, adv, cfg, 60))
            self.assertAlmostEqual(got, policy_loss(logp, old, adv, mask, average=average)[0].item(), places=4)
        for which, ids, *_ in train.shared_rows(rs, 60):
            self.assertTrue(len(ids) <= 60 or len(which) == 1)

    def test_gradient_is_clipped(self):
        """No update is longer than grad_clip allows, and it is the length before that is reported."""
        for most in (0.01, 0.0):                                     # 0: no limit
            cfg, model = train.Config(device="cpu", dtype="float32", micro_tokens=512, grad_clip=most), small_model(3)
            before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
            r = selfplay.Rollout("solve", "deduction", [1, 2], [3, END], [-2.0, -1.0])
            total = train.learn(cfg, model, [torch.optim.SGD(model.parameters(), lr=1.0)], [r], torch.ones(1),
                                random.Random(0))
            moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
            self.assertGreater(total["grad_norm"], 0.01)
            self.assertAlmostEqual(moved.norm().item(), most or total["grad_norm"], places=4)

    def test_epochs_and_shuffling(self):
        """Every epoch reads all rollouts once, in an order of its own, each with its own advantage."""
        cfg = train.Config(device="cpu", dtype="float32", micro_tokens=512, minibatches=3, epochs=2)
        rs = [selfplay.Rollout("solve", "deduction", [1, 2], [3 + i, END], [-2.0, -1.0]) for i in range(9)]
        seen, model = [], small_model(3)
        with unittest.mock.patch.object(train, "update", lambda cfg, m, o, batches, f, total: seen.extend(
                (int(row[2]), float(a)) for b in batches for row, a in zip(b[0], b[4]))), \
                unittest.mock.patch.object(train, "SHARED", 0), \
                unittest.mock.patch.object(train.rollout_batches, "__defaults__", (0,)):
            train.learn(cfg, model, [], rs, torch.arange(9.0), random.Random(0))
        for epoch in (seen[:9], seen[9:]):
            self.assertEqual(sorted(epoch), [(3 + i, float(i)) for i in range(9)])
        groups = [{x for x, _ in seen[k:k + 3]} for k in range(0, 18, 3)]
        self.assertNotEqual(groups[:3], groups[3:])

    def play(self, flags, steps=1):
        """self_play with invented proposals and verdicts: (Config, [(used, adv, learning rates)] a step, the metrics'
        rows, Game). A task's text says how many of its tries are right; replies differ in length."""
        cfg, _ = train.parse([*TINY, "--tries", "4", "--tasks", "5", "--seed_tasks", "0", "--eval_every", "0",
                              "--show_every", "1", "--steps", str(steps), *flags])
        seen = []

        def propose(cfg, model, ex, game, banned, step, rng, count):
            out = []
            for j, kind in enumerate(cfg.kinds.split(",")):
                for right in (0, 1, 2, 3, 4, None):
                    t = right if right is None else Task(kind, f"{right} {step}", ["1"], ["1"], ["1"], " add")
                    out.append(selfplay.Rollout("propose", kind, [1], [2] * (2 + j), [-1.0] * (2 + j), t,
                                                verdict="unparsable" if right is None else "valid"))
            return out

        def solve(cfg, model, ex, tasks, step):
            out = []
            for g, t in enumerate(tasks):
                n = int(t.program[0]) if t.program[0] in "01234" else 0
                t.rate = n / 4
                out += [selfplay.Rollout("solve", t.kind, [1], [2] * (3 + 5 * (i < n) + i), [-1.0] * 3, t, g, "a",
                                         v := "right" if i < n else "wrong", selfplay.SOLVE_REWARD[v])
                        for i in range(4)]
            return out

        def learn(cfg, model, optimizers, used, adv, rng):
            seen.append((used, adv, [g["lr"] for o in optimizers for g in o.param_groups]))
            return Counter()
        with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()), \
                unittest.mock.patch.multiple(train, propose=propose, solve=solve, learn=learn):
            model, old = train.new_model(cfg), os.path.join(out, "eval.json")
            open(old, "w").close()
            game, _ = train.self_play(cfg, model, self.ex, {}, set(), model.state_dict(), out)
            rows = evaluation.read_metrics(out)
            self.assertFalse(os.path.exists(old), "of fewer steps: it would say that the run is finished")
        return cfg, seen, rows, game

    def test_what_is_learnt_and_how_loud(self):
        """Tasks whose tries disagree, and all proposals, each whitened in its own cell (role, kind), by sequences or by
        tokens, with the floor; zero_reward prices tasks that none or all of the tries solved."""
        for flags in ([], ["--token_whiten", "true"], ["--zero_reward", "-0.5"], ["--negative", "0.5"],
                      ["--floor", "3"], ["--advantage", "group"]):
            cfg, ((used, adv, _),), _, _ = self.play(flags)
            solved = [r for r in used if r.role == "solve"]
            self.assertEqual({r.task.program[0] for r in solved}, set("123"))
            rewards = {r.task.program[0]: r.reward for r in used if r.role == "propose" and r.task}
            self.assertEqual(rewards, {"0": cfg.zero_reward, "1": 0.75, "2": 0.5, "3": 0.25, "4": cfg.zero_reward})
            want = torch.zeros(len(used))
            for cell in {(r.role, r.kind) for r in used}:
                mine = [i for i, r in enumerate(used) if (r.role, r.kind) == cell]
                rs = [used[i] for i in mine]
                want[mine] = advantages([r.reward for r in rs], ["x"] * len(rs), [r.group for r in rs], cfg.advantage,
                                        [len(r.reply) for r in rs] if cfg.token_whiten else None, cfg.floor)
            want = torch.where(want < 0, want * cfg.negative, want)
            self.assertTrue(torch.allclose(adv, want, atol=1e-5), flags)

    def test_what_the_buffers_keep(self):
        """Every valid task enters its buffer, whatever its rate; with previous_step a step solves the newest that the
        step before brought, and the report has tries of what it proposed itself."""
        _, _, rows, game = self.play([])
        self.assertEqual([len(b) for b in game.buffers.values()], [6, 6, 6])
        self.assertEqual(rows[0]["rollouts"], 3 * 5 * 4 + 18)
        _, seen, rows, game = self.play(["--previous_step", "true", "--skip_flat", "false"], 2)
        last = {r.task.program for r in seen[1][0] if r.role == "solve"}
        self.assertEqual(last, {f"{right} 0" for right in range(5)})
        self.assertTrue(all(t["tries"] for row in rows for t in row["tasks"]))
        self.assertEqual(rows[0]["rollouts"], 3 * 4 + 3 * 5 * 4 + 18)

    def test_learning_rates(self):
        """The rate rises over lr_warmup steps, stands, and falls over the last lr_decay of them, to a twentieth at the
        least; the sharpness's alike."""
        cfg, seen, _, _ = self.play(["--lr_warmup", "4", "--lr_decay", "0.5", "--lr", "1", "--sharp_lr", "2"], 20)
        rates = [lrs[0] for _, _, lrs in seen]
        want = [0.25, 0.5, 0.75] + [1.0] * 8 + [k / 10 for k in range(9, 0, -1)]
        self.assertTrue(np.allclose(rates, want), rates)
        self.assertTrue(np.allclose([lrs[1] for _, _, lrs in seen], 2 * np.array(want)))

    def test_figures_of_a_step(self):
        """novel leaves out what did not parse; overclaim is of wrong answers alone; no update, no KL."""
        R = selfplay.Rollout
        cfg, task = train.Config(kinds="deduction"), Task("deduction", "p", ["1"], ["1"], ["1"], rate=0.5)
        proposals = [R("propose", "deduction", [1], [END], [0.0], verdict=v, known=k)
                     for v, k in (("unparsable", False), ("known", True), ("syntax", False), ("known", True))]
        solves = [R("solve", "deduction", [1], [selfplay.RIGHT] * said + [END], [0.0], task, 0, "", v)
                  for said, v in ((1, "right"), (1, "wrong"), (0, "wrong"), (1, "unparsable"))]
        row = train.step_figures(cfg, self.ex, proposals, solves, [], torch.zeros(0), Counter())
        self.assertNotIn("kl", row, "nothing was learnt, so nothing is said of it")
        self.assertIsNone(row["padding"])
        self.assertAlmostEqual(row["novel"]["deduction"], 1 / 3)
        self.assertEqual(row["overclaim"]["deduction"], 0.5)

    def test_controls_keep_out_the_suite(self):
        """Generated tasks of the controls are never held-out ones, and are of even or of the warm-up's depths."""
        cfg, rng = train.Config(), lambda: random.Random(1)
        free = train.generated(cfg, self.ex, rng(), "deduction", 120, set())
        depths = Counter(len(d.lines) for d, _, _ in free)
        self.assertGreater(min(depths[k] for k in range(1, 7)), 8)
        banned = {d.program for d, _, _ in free if len(d.lines) > 1}
        again = train.generated(cfg, self.ex, rng(), "deduction", 120, banned)
        self.assertFalse({d.program for d, _, _ in again} & banned)
        cfg.depths = "rare"
        depths = Counter(len(d.lines) for d, _, _ in train.generated(cfg, self.ex, rng(), "deduction", 120, set()))
        self.assertGreater(depths[1], 70)

    def test_seeding_fills_every_buffer(self):
        """Seeding goes on until the emptiest buffer that is played has seed_tasks tasks."""
        cfg, _ = train.parse([*TINY, "--seed_tasks", "5"])

        def one(cfg, model, ex, game, banned, step, rng, count):
            kinds = KINDS if step < -3 else KINDS[:1]
            return [selfplay.Rollout("propose", k, [], [], [], Task(k, str(step), ["1"], ["1"], ["1"])) for k in kinds]
        with unittest.mock.patch.object(train, "propose", one), contextlib.redirect_stdout(io.StringIO()):
            game = train.seeded(cfg, None, self.ex, set())
        self.assertEqual([len(b) for b in game.buffers.values()], [8, 5, 5])

    def test_limits_that_hold_and_that_do_not(self):
        """A single kind may have as many proposals as the places of all, a fixed set has none; a block must hold a
        proposal."""
        self.assertEqual(train.parse([*TINY, "--kinds", "deduction", "--proposals", "12"])[0].proposals, 12)
        train.parse([*TINY, "--proposer", "fixed", "--proposals", "40"])
        with contextlib.redirect_stderr(io.StringIO()), self.assertRaises(SystemExit):
            train.parse([*TINY, "--max_new", "8", "--block_size", "200"])

    def test_warm_up_rates(self):
        """The warm-up's rate rises over 30 steps, stands to the half, then falls in a line to a twentieth."""
        cfg, _ = train.parse([*TINY, "--warmup_steps", "100", "--warmup_batch", "2"])
        seen, model = [], train.new_model(cfg)
        with unittest.mock.patch.object(train, "set_lr", lambda o, scale: seen.append(scale)), \
                unittest.mock.patch.object(train, "accumulate", lambda *a: [{"loss": torch.zeros(())}]), \
                unittest.mock.patch.object(train, "make_optimizers", lambda *a: []), \
                contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as out:
            train.train_base(cfg, model, self.ex, set(), out, f"{out}/part")
        want = [(k + 1) / 30 for k in range(30)] + [1.0] * 20 + [max(0.05, 2 - k / 50) for k in range(50, 100)]
        self.assertTrue(np.allclose(seen, want))

    def test_others_draw_what_the_trainer_would(self):
        """What processes of their own draw is, in order, what the trainer draws where there is one core, also from the
        middle of a chunk; none of them outlives it."""
        cfg, _ = train.parse([*TINY, "--warmup_steps", "530", "--warmup_batch", "2", "--habits_from", "0.5"])
        model, before, seen = train.new_model(cfg), descendants(os.getpid()), []
        with unittest.mock.patch.object(train, "demo_batches", lambda mine, cfg: seen.append(mine) or []), \
                unittest.mock.patch.object(train, "accumulate", lambda *a: [{"loss": torch.zeros(())}]), \
                unittest.mock.patch.object(train, "make_optimizers", lambda *a: []), \
                unittest.mock.patch.object(train, "load_weights", lambda *a: None), \
                contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as out:
            def warmed(device, cores, first):
                evaluation.save(f"{out}/part", {"version": evaluation.VERSION, "model": {}, "optimizers": [],
                                                "step": first, "seconds": 0.0, "hits": 0})
                seen.clear()
                with unittest.mock.patch.object(train, "cores", lambda: cores):
                    train.train_base(replace(cfg, device=device), model, self.ex, set(), out, f"{out}/part")
                return list(seen)
            here = warmed("cpu", 1, 0)
            self.assertEqual(len(here), 530)
            self.assertEqual(warmed("cuda", 4, 70), here[70:])
            context = multiprocessing.get_context("spawn")
            with unittest.mock.patch.object(type(context), "Queue", side_effect=OSError(38, "no semaphores")) as asked:
                self.assertEqual(warmed("cuda", 4, 500), here[500:])
            asked.assert_called()
        tracker = multiprocessing.resource_tracker._resource_tracker._pid      # Python's own, ends with this process
        self.assertEqual([pid for pid in descendants(os.getpid()) if pid not in [*before, tracker]], [])

    def test_a_restored_buffer_still_forgets(self):
        """After --resume a full buffer drops its oldest task, as before."""
        cfg, model = train.Config(buffer_size=2), small_model(3)
        base, opts = model.state_dict(), train.make_optimizers(model, False, 0.0, 0.1)
        game = train.Game({k: collections.deque([], 2) for k in KINDS}, set())
        with tempfile.TemporaryDirectory() as tmp:
            train.checkpoint(tmp, model, base, opts, game, 5, 1.5)
            got, _, _ = train.restore(cfg, f"{tmp}/ckpt.pt", model, base, opts)
        self.assertEqual({b.maxlen for b in got.buffers.values()}, {2})


# ---------------------------------------------------------------------------------------------------------------------
# The executor, by adversary: whatever a model writes


def body(text):
    """A program whose f() has these lines."""
    return "def f(*a):\n" + textwrap.indent(textwrap.dedent(text).strip("\n"), "    ")


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def descendants(pid):
    """All processes below pid, from /proc."""
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:
                    parents[int(name)] = int(file.read().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue     # it ended between listdir and open
    found, more = set(), {pid}
    while more:
        more = {child for child, parent in parents.items() if parent in more}
        found |= more
    return found


class ExecutorTest(unittest.TestCase):
    """One executor for all tests here: whatever one test does to it, the next must not notice."""

    @classmethod
    def setUpClass(cls):
        cls.ex = Executor()
        cls.addClassCleanup(cls.ex.close)

    def errors(self, programs, args="", allowed=(), **how):
        """Run them all; each must fail, with an error out of allowed if given."""
        for program, r in zip(programs, self.ex.run([(p, args) for p in programs], **how)):
            with self.subTest(program=program, result=r):
                self.assertFalse(r.ok)
                self.assertEqual((r.value, r.key), ("", ""))
                if allowed:
                    self.assertIn(r.error, allowed)

    def values(self, jobs):
        """{(program, args): expected value}; each must give it."""
        for (job, expected), r in zip(jobs.items(), self.ex.run(list(jobs))):
            with self.subTest(job=job, result=r):
                self.assertEqual((r.value, r.error), (expected, ""))

    def tearDown(self):
        self.assertEqual(self.ex.replaced, 0, "no program may kill a zygote")

    # ---- honest programs

    def test_honest_programs(self):
        """Honest code runs: imports, classes with dunders, recursion, generators, odd but innocent names."""
        self.values({
            ("def f(x):\n    return x[::-1]", "[1, 2]"): "[2, 1]",
            ("def f():\n    return None", ""): "None",
            ("def f(a, b=2, *c, **d):\n    return a, b, c, d", "1, 3, 4, z=[5]"): "(1, 3, (4,), {'z': [5]})",
            ("import math\ndef f(n):\n    return math.gcd(n, 12), math.floor(math.pi)", "18"): "(6, 3)",
            ("from collections import Counter, defaultdict, deque\ndef f(s):\n    d = defaultdict(list)\n"
             "    d[1].append(2)\n"
             "    return dict(Counter(s)), dict(d), list(deque([1, 2], maxlen=1))", "'aab'"):
                "({'a': 2, 'b': 1}, {1: [2]}, [2])",
            ("import collections.abc\ndef f(x):\n    return isinstance(x, collections.abc.Sequence)", "[1]"): "True",
            ("import itertools as it\ndef f(n):\n    return list(it.accumulate(range(n)))", "4"): "[0, 1, 3, 6]",
            ("from functools import reduce, lru_cache, wraps, partial\n@lru_cache(None)\ndef g(n):\n"
             "    return n if n < 2 else g(n - 1) + g(n - 2)\ndef deco(h):\n    @wraps(h)\n    def w(*a):\n"
             "        return h(*a) + 1\n"
             "    return w\n@deco\ndef f(n):\n    return reduce(lambda a, b: a * b, [g(n), 1])", "30"): "832041",
            ("import operator\ndef f(x):\n    return sorted(x, key=operator.itemgetter(1)), operator.add(1, 2)",
             "[(1, 2), (2, 1)]"): "([(2, 1), (1, 2)], 3)",
            ("from operator import attrgetter, methodcaller\ndef f(x):\n"
             "    return attrgetter('real')(x), methodcaller('bit_length')(x)",
             "5"): "(5, 3)",
            ("import re\ndef f(s):\n"
             "    return re.sub(r'(\\d+)', lambda m: str(int(m.group(1)) * 2), s), re.compile('a').findall(s)",
             "'a1b22'"): "('a2b44', ['a'])",
            ("import heapq, bisect\ndef f(x):\n    heapq.heapify(x)\n"
             "    return heapq.heappop(x), bisect.bisect([1, 3], 2)",
             "[3, 1]"): "(1, 1)",
            ("import string, copy\ndef f(x):\n    y = copy.deepcopy(x)\n    y[0].append(string.digits)\n"
             "    return x, y", "[[1]]"):
                "([[1]], [[1, '0123456789']])",
            ("from __future__ import annotations\nfrom typing import List, Optional\n"
             "def f(x: List[int]) -> Optional[int]:\n"
             "    return x[0] if x else None", "[7]"): "7",
            ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int = 1\ndef f(x):\n"
             "    return P(x) == P(x), repr(P(x))",
             "3"): "(True, 'P(x=3)')",
            ("from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass T:\n    v: int\n"
             "    left: 'T' = None\ndef f(x):\n    return T(x, T(x)).left.v", "3"): "3",
            ("from __future__ import annotations\nfrom dataclasses import dataclass\nfrom typing import ClassVar\n"
             "@dataclass\nclass A:\n    n: ClassVar[int] = 0\n    x: int = 1\ndef f(v):\n    return A(v).x, A.n", "5"):
                "(5, 0)",
            ("def f(s):\n    return s.encode('utf-16-le'), b'a\\\\n'.decode('unicode_escape')", "'a'"):
                "(b'a\\x00', 'a\\n')",
            ("from enum import Enum\nclass C(Enum):\n    RED = 1\ndef f():\n    return C.RED.name, C(1).value",
             ""): "('RED', 1)",
            ("class V:\n    def __init__(self, x):\n        self.x = x\n    def __add__(self, o):\n"
             "        return V(self.x + o.x)\n"
             "    def __repr__(self):\n        return f'V({self.x})'\n    def __eq__(self, o):\n"
             "        return self.x == o.x\n"
             "    def __hash__(self):\n        return hash(self.x)\n    def __len__(self):\n        return self.x\n"
             "    def __iter__(self):\n        yield self.x\n    def __enter__(self):\n        return self\n"
             "    def __exit__(self, *a):\n        return True\ndef f(n):\n    with V(n) as v:\n"
             "        return repr(v + V(1)), v == V(n), len({v, V(n)}), len(v), list(v)",
             "4"): "('V(5)', True, 1, 4, [4])",
            ("def f(n):\n    return 1 if n == 0 else n * f(n - 1)", "20"): "2432902008176640000",
            ("def f(n):\n    def g():\n        for i in range(n):\n            yield i * i\n    return sum(g())",
             "5"): "30",
            ("def f():\n    try:\n        [][1]\n    except Exception as e:\n        return type(e).__name__, str(e)",
             ""):
                "('IndexError', 'list index out of range')",
            ("class A:\n    def __init__(self):\n        self.id = 1\n        self.open = 2\ndef f(input, dir):\n"
             "    a = A()\n    return a.id + a.open + input + dir", "3, 4"): "10",
            ("def process_input(x):\n    return x\ndef f(x):\n    return process_input(x), ('__init__', '__class__')",
             "1"):
                "(1, ('__init__', '__class__'))",
            ("def f(x):\n    return x\nif __name__ == '__main__':\n    print(f(1))", "2"): "2",
            ("def f(x):\n    match x:\n        case [a, *_]:\n            return a\n        case {'k': v}:\n"
             "            return v\n"
             "        case int(n):\n            return n", "{'k': 5}"): "5",
            ("def f(x):\n    print(x)\n    return '{:>5}|{!r}|{x}'.format(x, x, x=x), f'{x:.2f}', '%d' % x", "3"):
                "('    3|3|3', '3.00', '3')",
            ("try:\n    import numpy as np\nexcept ImportError:\n    np = None\ndef f():\n    return np is None",
             ""): "True",
            ("try:\n    import numpy\nexcept ModuleNotFoundError:\n    numpy = 5\ndef f():\n    return numpy", ""): "5",
            ("import unicodedata\ndef f(c):\n    return unicodedata.name(c), b'\\\\N{DIGIT ONE}'.decode("
             "'unicode_escape')", "'a'"): "('LATIN SMALL LETTER A', '1')",
            ("f = lambda x: x ** 2", "3"): "9",
            ("from typing import ContextManager, Match\ndef f(m: Match):\n    return m", "3"): "3",
            ("def f(x):\n    caf\u00e9 = x\n    return caf\u00e9 + '\u00fc\U0001f600'",
             "'\u00e9'"): "'\u00e9\u00fc\U0001f600'",
            ("def f(x):\n    return getattr(x, 'real'), hasattr(x, 'nope'), getattr(x, 'nope', 3)",
             "5"): "(5, False, 3)",
            ("def f(x):\n    return sorted(set(x)), {3, 1, 2}, len(x)", "'cab'"): "(['a', 'b', 'c'], {1, 2, 3}, 3)",
            # for these Python loads modules of its own, from 3.12 and 3.14 on
            ("def f():\n    return 10 ** 5000 // 10 ** 3000 % 7", ""): "2",
            **({("from dataclasses import dataclass\n@dataclass\nclass T:\n    v: int\n    left: int | 'T' = 0\n"
                 "def f():\n    return T(1, T(2)).left.v", ""): "2"} if sys.version_info >= (3, 14) else {}),
        })

    def test_results_in_order_and_errors_named(self):
        """Errors are classes, in the order of the jobs; one failure never moves its neighbours' answers."""
        cases = [("def f(x):\n    return x +", "1", "syntax"), ("def f(x)\n    return 1", "1", "syntax"), ("", "",
                                                                                                           "no_f"),
                 ("g = 1", "", "no_f"), ("f = 3", "", "no_f"), (body("return 1 / 0"), "", "ZeroDivisionError"),
                 (body("return {}[1]"), "", "KeyError"), (body("return undefined"), "", "NameError"),
                 (body("raise StopIteration"), "", "StopIteration"), (body("raise SystemExit"), "", "SystemExit"),
                 (body("raise OSError"), "", "OSError"),
                 ("class E(ValueError): pass\ndef f(): raise E()", "", "ValueError"), ("1 / 0\ndef f(): return 1", "",
                                                                                       "ZeroDivisionError"),
                 ("def f(x): return x", "", "TypeError"), ("def f(): return 1", "2", "TypeError"),
                 (body("assert False"), "", "AssertionError"), ("def f(n): return f(n + 1)", "0", "RecursionError"),
                 (body("raise KeyboardInterrupt"), "", "KeyboardInterrupt"), (body("raise SyntaxError"), "",
                                                                              "SyntaxError"),
                 ("def f(): yield 1", "", "output"), ("def f(): return f", "", "output"),
                 ("def f(x): return x", "1 / 0", "ZeroDivisionError"), ("def f(x): return x", "y", "NameError")]
        jobs = []
        for i, (program, args, _) in enumerate(cases):
            jobs += [(program, args), (f"def f(x): return x + {i}", str(i))]
        results = self.ex.run(jobs)
        for i, (program, args, error) in enumerate(cases):
            with self.subTest(program=program):
                self.assertEqual(results[2 * i].error, error)
                self.assertEqual(results[2 * i + 1].value, str(2 * i))

    # ---- exactness

    def test_a_metaclass_cannot_pass_for_data(self):
        """A class whose metaclass calls itself equal to everything is no data, and forges no error."""
        head = ("class M(type):\n    def __eq__(c, o): return True\n    def __hash__(c): return 1\n"
                "class Y(%s, metaclass=M):\n    def __repr__(s): return 'forged'\n    def __len__(s): return 0\n"
                "    def is_integer(s): return False\ndef f(): %s")
        self.errors([head % (base, "return " + out) for base in ("object", "int", "list", "dict", "str")
                     for out in ("Y()", "[Y()]", "{1: Y()}")], allowed=["output"])
        self.errors([head % ("ValueError", "raise Y()")], allowed=["ValueError"])

    def test_non_plain_outputs_are_refused(self):
        """Only exact plain data comes out: no subclass, no object that lies about its class, no cycle."""
        self.errors(["class Y:\n    def __eq__(s, o): return True\ndef f(): return Y()",
                     "class L(list): pass\ndef f(): return L([1])", "class S(str): pass\ndef f(): return [S('a')]",
                     "class I(int):\n    def __repr__(s): return '42'\ndef f(): return I(1)",
                     "class L:\n    __class__ = int\n    def __repr__(s): return '42'\ndef f(): return L()",
                     "from collections import Counter\ndef f(): return Counter('a')",
                     "from collections import namedtuple\ndef f(): return namedtuple('P', 'x')(1)",
                     "class B(dict):\n    def items(s): return [(1, 2)]\ndef f(): return B()",
                     body("return object"), body("return range(3)"), body("return iter([])"),
                     body("return {1: 2}.keys()"),
                     body("return ..."), body("return bytearray(b'a')"), body("return NotImplemented"),
                     body("x = []\nx.append(x)\nreturn x"), body("x = {}\nx[1] = [x]\nreturn x"),
                     body("x = []\nfor i in range(100): x = [x]\nreturn x"),
                     body("x = [1]\nfor i in range(50): x = [x, x]\nreturn x")], allowed=["output"])

    def test_outputs_whole_or_error(self):
        """An output is never cut: just under the limit it is whole, over it an error."""
        n = executor.CHARS
        [small, large] = self.ex.run([("def f(n): return 'a' * n", str(n - 2)), ("def f(n): return 'a' * n",
                                                                                 str(n - 1))])
        self.assertEqual(small.value, repr("a" * (n - 2)))
        self.assertEqual(large.error, "output")
        self.errors([body("return 'a' * 10 ** 7"), body("return list(range(10 ** 5))"), body("return 10 ** 5000"),
                     body("return 1 << 10 ** 8"), body("return b'a' * 10 ** 7"),
                     body("return {i: i for i in range(10 ** 5)}"),
                     body("return ['a' * 5000] * 10 ** 6"), body("return ['a' * 8000] * 8000")], allowed=["output"])
        [huge] = self.ex.run([(body("return [1e308] * 1000"), "")])
        self.assertEqual(huge.value.count("e+308"), 1000)
        self.assertEqual(self.ex.equal([(huge.value, huge.value), (huge.value[:3600] + "]", huge.value)]),
                         [True, False])
        there = repr({i: 0 for i in range(700)})              # two outputs of any length can be compared
        back = repr({i: 0.0 for i in reversed(range(700))})
        self.assertEqual(self.ex.equal([(there, back), (there, back.replace("699", "700"))]), [True, False])
        self.assertEqual(self.ex.equal([("1, 1 #", "42"), ("*[1, 1]", ""), ("1], [1", "1")]), [False] * 3)   # one each

    def test_keys_are_type_strict_and_loose_is_python_equality(self):
        """Equal keys mean equal values of equal types; equal() means ==; neither depends on set or dict order."""
        texts = ["1", "1.0", "True", "1+0j", "(1,)", "[1]", "'1'", "b'1'", "{1}", "frozenset({1})", "0.0", "-0.0",
                 "{1: 2, 3: 4}",
                 "{3: 4, 1: 2}", "{'a', 'b'}", "{'b', 'a'}", "None", "[]", "()", "{}", "set()", "frozenset()", "inf",
                 "-inf",
                 "{1.0: [True]}", "{1: [1]}", "1e300", "2+3j", "2.0+3j", "0.1", "'\\ud800'", "0.30000000000000004",
                 "0.3"]
        results = self.ex.literals(texts)
        scope = {"inf": float("inf")}
        loose = iter(self.ex.equal([(a.value, b.value) for a in results for b in results]))
        for a, ra in zip(texts, results):
            self.assertTrue(ra.ok, (a, ra))
            for b, rb in zip(texts, results):
                with self.subTest(a=a, b=b):
                    va, vb = eval(a, scope), eval(b, scope)
                    self.assertEqual(next(loose), va == vb)
                    exact = va == vb and type(va) is type(vb) and {a, b} not in ({"0.0", "-0.0"}, {"{1.0: [True]}",
                                                                                                   "{1: [1]}"})
                    self.assertEqual(ra.key == rb.key, exact)
        long = "'" + "a" * 7000 + "'"                          # as long as an output may be
        self.assertEqual(self.ex.literals([long])[0].key, long)
        nan = self.ex.literals(["nan", "[nan]"])
        self.assertEqual([r.key for r in nan], ["nan", "[nan]"])
        self.assertEqual(self.ex.literals(["{nan, nan}"])[0].key, "{nan, nan}")

    def test_values_can_be_read_back(self):
        """The value of any ok result is a literal with the same key: a task's gold output can be an answer."""
        programs = [body("return " + t) for t in ["float('inf'), -float('inf'), float('nan')",
                                                  "{3, 'a', (1, 2)}, frozenset([1]), set()",
                    "{'b': [1.5, -2], 'a': {None: b'x'}}", "-1-2j, 1j, -(2j), complex('inf+nanj')",
                    "'\\x00\\ud800\\u00e9\"\\''",
                    "frozenset([frozenset()])"]]
        outputs = self.ex.run([(p, "") for p in programs])
        self.assertTrue(all(r.ok for r in outputs), outputs)
        self.assertEqual([r.key for r in self.ex.literals([r.value for r in outputs])], [r.key for r in outputs])

    def test_what_a_program_notices(self):
        """print asks for the text of what it prints; each nan is one of its own, as it is behind float('nan'); a codec
        that Python has and a child has not ends the run; a method of a class may be called _evaluate."""
        self.values({
            ("class A:\n    n = 0\n    def __str__(s):\n        A.n += 1\n        return 'x'\n"
             "def f():\n    print(A(), end='')\n    print(A(), A())\n    return A.n", ""): "3",
            ("def f():\n    try:\n        print(10 ** 5000)\n    except ValueError:\n        return 'too long'", ""):
                "'too long'",
            ("def f(x):\n    return len(x)", "{nan, nan}"): "2",
            ("def f(x):\n    return len(x)", "{nan: 1, nan: 2}"): "2",
            ("def f(x):\n    return x.count(x[0])", "[nan, nan]"): "1",
            ("def f(x):\n    return x", "[inf, -inf, nan, infj, {nan}]"): "[inf, -inf, nan, infj, {nan}]",
            ("inf = 1\ndef f(x):\n    return x", "inf"): "1",
            ("class E:\n    def _evaluate(s, x): return x + 1\ndef f(x):\n    return E()._evaluate(x)", "3"): "4"})
        self.errors(["def f():\n    try:\n        return 'x'.encode('iso-8859-2')\n    except LookupError:\n"
                     "        return 'no such codec'"], allowed=["forbidden"])

    def test_answers_must_be_literals(self):
        """An answer is data: code, calls and names in it are errors, whatever they would return."""
        bad = ["f(1)", "__import__('os').getpid()", "1 + 1", "sum(range(3))", "[x for x in (1, 2)]", "x", "", " ", "#",
               "1;2", "1\n2", "lambda: 1",
               "{**{}}", "*[1]", "f'{1}'", "1 if 1 else 2", "...", "'a' * 9", "set([1], 2)", "range(10 ** 9)", "{[]}",
               "(" * 300 + ")" * 300,
               "-" * 3000 + "1", "[" * 3000, "9" * 4290, "'\ud800'", "1\0", "x := 1", "1)", "(yield)",
               "float('1' + '2')", "'a" ]
        for text, r in zip(bad, self.ex.literals(bad)):
            with self.subTest(text=text[:40]):
                self.assertFalse(r.ok, r)
        good = {" [1,2] ": "[1, 2]", "1, 2": "(1, 2)", "'a' 'b'": "'ab'", "-1": "-1", "float('inf')": "inf",
                "{2,1}": "{1, 2}", "1_000": "1000"}
        self.assertEqual([r.value for r in self.ex.literals(list(good))], list(good.values()))

    def test_complexity_is_counted_not_run(self):
        """Nodes and decisions as counted by hand; a program is parsed for it and never run, and may be no program."""
        cases = {"x = 1": (5, 1),                                                  # Module Assign Name Store Constant
                 "def f(x):\n    return x": (7, 1), "while 1:\n    raise SystemExit": (6, 2),
                 "a if b and c or d else e": (17, 4), "[v for v in x if v if w]": (14, 4), "(" * 999: (0, 0),
                 "1 +": (0, 0), "\0": (0, 0), "'\ud800'": (0, 0), "": (1, 1)}
        self.assertEqual(dict(zip(cases, self.ex.complexity(list(cases)))), cases)

    def test_input_injection(self):
        """An input cannot close the call or bind names; one that is no literal does what Python does, in its run."""
        program = "import math\nstate = [1]\ndef g(): return 1\ndef f(*x, **k): return state, g(), math.sqrt(4), len(x)"
        bad = ["1) or (2", "1)(2", "1), f(2", "1) if 1 else (2", "1)\nimport os\n(1", "1; 2", ") + f(", "1) #",
               "g := lambda: 5", "x=1, x=2",
               "(f := 1)", "[g := (lambda: 9)]", "__import__('os')", "open('x')", "exec('g = 1')", "globals().clear()",
               "setattr(math, 'sqrt', len)",
               "().__class__.__base__.__subclasses__()", "yield 1", "await 1", "1,, 2", "]", "'", '"""', "(1", "\0",
               "\ud800", "return"]
        for text, r in zip(bad, self.ex.run([(program, text) for text in bad])):
            with self.subTest(args=text):
                self.assertFalse(r.ok, r)
        same = ["1, 2", "dict(a=1), 'a' * 20", "lambda x: x, [i for i in state]", "1, 2,", "1, 2 # note", "*[1, 2]"]
        states = {"state.append(2), 1": "[1, 2]", "state.clear(), g": "[]", "[state.pop(), 1], 1": "[]"}
        states |= dict.fromkeys(same, "[1]")
        for text, r in zip(states, self.ex.run([(program, text) for text in states])):
            with self.subTest(args=text):
                self.assertEqual(r.value, f"({states[text]}, 1, 2.0, 2)")

    def test_objects_as_inputs(self):
        """An input may hold what the program defines, and f knows it again: a class's object, a member, a sentinel."""
        self.values({
            ("class P:\n    pass\ndef f(p):\n    return isinstance(p, P)", "P()"): "True",
            ("from enum import Enum\nclass C(Enum):\n    A = 1\ndef f(c):\n    return c is C.A", "C.A"): "True",
            ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\ndef f(p):\n    match p:\n"
             "        case P(0):\n            return 'origin'", "P(0)"): "'origin'",
            ("EMPTY = object()\ndef f(x):\n    return x[0] is EMPTY", "[EMPTY]"): "True",
            ("def f(g):\n    return g(2)", "lambda x: x + 1"): "3",
            ("x = 0\ndef g():\n    global x\n    x += 1\n    return x\ndef f(*a):\n    return a", "g(), x"): "(1, 1)",
            ("inf = 5\ndef f(*a):\n    return a", "inf, -infj"): "(5, -infj)",
            ("state = []\nclass A:\n    pass\ndef f(x):\n    return state", "state.append(1)"): "[1]"})

    def test_mutation_cannot_leak(self):
        """Each run has a fresh input, fresh defaults and fresh globals, also where one program has many inputs."""
        program = ("seen = []\ndef f(x, acc=[]):\n    acc.append(1)\n    seen.append(x)\n"
                   "    x.append(len(acc) + len(seen))\n    return x")
        for r in self.ex.run([(program, f"[{i}]") for i in range(50)]):
            self.assertEqual(r.value[-2:], "2]")
        r = self.ex.run([(program, "[0]")] * 3)
        self.assertEqual([x.value for x in r], ["[0, 2]"] * 3)

    def test_text_that_is_no_program(self):
        """Surrogates, NUL, cookies, very long and very deep text are syntax errors or plain text, never a crash."""
        self.errors(["def f(): return '\ud800'", "def f():\0 return 1", "x" * 9000, "(" * 5000,
                     "[" * 150 + "]" * 150 + "\x00", "-" * 8000 + "1",
                     "f(" * 2000, "\n".join(" " * i + "if 1:" for i in range(120)), "x = " + "a." * 3000,
                     "def f():\n\treturn 1\n        return 2", "'" + "\\N{DIGIT ONE}" * 500, "f'{" * 500,
                     "a = " * 2500 + "1\nx y",
                     "@" * 3000, "class C:" * 500, "\ufeff\ufeffdef f(): return 1", "def f(): return 1\n" + "\\" * 99],
                    allowed=["syntax", "RecursionError"])
        deep = ["x = " + "+".join("1" * 3000), "x = " + "(" * 90 + ")" * 90,
                "if 1:\n pass\n" + "elif 1:\n pass\n" * 600, "x = " + "-" * 4000 + "1",
                "x = " + "1**" * 1500 + "1", "x = 'a' " + "+ 'b'" * 1500, "x = 1" + "\n[0]" * 10, "x = " + "[0]" * 2000,
                "not " * 2000 + "1", "lambda: " * 1000 + "1"]
        for r in self.ex.run([(p, "") for p in deep]):
            self.assertIn(r.error, ("no_f", "syntax", "memory", "RecursionError", "TypeError", "crash", "timeout"))
        self.values({("# -*- coding: utf-16 -*-\ndef f(): return '\u00e9'", ""): "'\u00e9'",
                     ("def f(): return len('\\ud800\\x00')", ""): "2"})

    # ---- determinism

    def test_nondeterministic_programs(self):
        """Hash order and addresses never come out as values, also from two elements only."""
        programs = [body("return list(set('abcdefgh'))"), body("return list({'a', 'b'})"),
                    body("return ''.join(frozenset('xyz'))"),
                    body("return hash('a')"), body("return hash('a') % 7"), body("return str(object())"),
                    body("return repr(f)"),
                    body("return {'a', 'b', 'c', 'd'}.pop()"),
                    body("return list({'ab': 1, 'cd': 2}.keys() & {'ab', 'cd'})"),
                    "class A: pass\ndef f(): return repr(A())", "class A: pass\ndef f(): return hash(A())",
                    body("return [x for x in {'k1', 'k2', 'k3'}]"),
                    body("return str({'a', 'b', 'c'})"), body("return f'{(lambda: 1)}'"),
                    body("return '%s' % (x for x in [])"),
                    body("return next(iter({'q': 1, 'w': 2, 'e': 3}.items() - set()))"),
                    body("return sorted([object(), object()], key=hash) == 1 or '{}'.format(f)"),
                    body("return next(iter(set('hello world')))"),
                    *(f"class A: pass\ndef f(): return hash(A) % 256, {i}" for i in range(6))]
        self.errors(programs, allowed=["nondeterministic"])
        self.errors(["def f(x): return list(x)", "def f(x): return x.pop(), 1"], "{'q', 'w'}",
                    allowed=["nondeterministic"])
        equal = "{'a': 1, 'b': 1, 'e': 1, 'l': 1, 'o': 1, 's': 1, 't': 1, 'u': 1}"   # dicts of another order are equal
        self.values({("def f(s): return {c: s.count(c) for c in set(s)}", "'absolute'"): equal,
                     ("def f(s): return {'z': 1, 'a': 2}", "'x'"): "{'z': 1, 'a': 2}"})
        for arg in ("''.join(dict.fromkeys('%s').keys() & '%s')", "hash('%s') + hash('%s')"):     # in inputs too
            self.errors(["def f(x): return x"], arg % ("abcd", "abcd"), allowed=["nondeterministic"])
        self.errors([body(f"r = ''\nfor c in {{'{a}', '{b}'}}: r += c\nreturn r") for a, b in ("ab", "cd", "ef", "gh")],
                    allowed=["nondeterministic"])            # compiled to a frozenset: no instruction makes a set
        self.errors([body("return id(1)"), "import time\ndef f(): return time.time()",
                     "import random\ndef f(): return random.random()",
                     "import uuid\ndef f(): return 1", "from os import urandom\ndef f(): return 1"],
                     allowed=["forbidden"])

    def test_one_run_without_check(self):
        """check=False is one run: it may not be mixed up with the checked verdict, not even in the cache."""
        job = [(body("return list({'a', 'b', 'c', 'd', 'e', 'f'})"), "")]
        self.assertTrue(self.ex.run(job, check=False)[0].ok)
        self.assertEqual(self.ex.run(job)[0].error, "nondeterministic")
        self.assertTrue(self.ex.run(job, check=False)[0].ok)

    # ---- harm

    def test_escapes_are_refused(self):
        """Ways out: frames, subclasses, match patterns, decorators, type hints, attribute paths, imports."""
        self.errors([body("return ().__class__.__base__.__subclasses__()"), body("return f.__globals__"),
                     body("return (lambda: 0).__code__.co_code"),
                     body("g = (x for x in [1])\nreturn g.gi_frame.f_back.f_globals"),
                     body("try: 1/0\nexcept Exception as e: return e.__traceback__.tb_frame"),
                     body("return getattr((), '__cl' + 'ass__').__base__.__subclasses__()"),
                     body("return getattr(f, '__glo' + 'bals__')"),
                     "class S(str):\n    def split(s, *a): return []\n"
                     "def f(): return getattr(f, S('__globals__'))['__name__']",
                     body("return print.__self__"), body("return __builtins__"), body("return __import__('os')"),
                     body("return f'{f.__globals__}'"),
                     body("match f:\n    case object(__globals__=g): return g"),
                     body("match ():\n    case tuple(__class__=object(__subclasses__=s)): return s()"),
                     "def g(h): return h.__globals__\n@g\ndef f(): pass",
                     "def f(x: (1).__class__.__base__.__subclasses__() = 1): return 1",
                     "from operator import attrgetter\ndef f(): return attrgetter('__globals__')(f)",
                     "from operator import methodcaller\ndef f(): return methodcaller('__subclasses__')(int)",
                     "from typing import ForwardRef\ndef f(): return 1",
                     "from typing import List, get_args\n"
                     "def f(): return get_args(List['1'])[0]._evaluate({}, {}, frozenset())",
                     "from typing import get_type_hints\ndef f(): return 1",
                     "import string\ndef f(): return string.Formatter().get_field('0.__class__', [f], {})",
                     "import re\ndef f(): return re.enum.sys",
                     "import typing\ndef f(): return typing.sys",
                     "import collections\ndef f(): return collections._sys", "from os import *\ndef f(): return 1",
                     "import sys\ndef f(): return 1", "import ctypes\ndef f(): return 1",
                     "import gc\ndef f(): return 1", "import importlib\ndef f(): return 1",
                     "import builtins\ndef f(): return 1", "import inspect\ndef f(): return 1",
                     "from . import x\ndef f(): return 1",
                     body("return eval('1')"), body("exec('x = 1')\nreturn 1"), body("return compile('1', '', 'eval')"),
                     body("return globals()"),
                     body("return open('/etc/passwd').read()"), body("return input()"), body("breakpoint()"),
                     "class M(type):\n    def __getattribute__(c, n): return 1\nclass A(metaclass=M): pass\n"
                     "def f(): return A.x"])

    def test_format_strings_give_text_only(self):
        """str.format can read attributes, but only makes text: no object, no address."""
        programs = ["def f(): return '{0.__globals__}'.format(f)",
                    "def f(): return '{0.__globals__[__builtins__]}'.format(f)",
                    "class A:\n    def m(s): pass\ndef f(): return '{0.m.__func__.__globals__}'.format(A())",
                    "def f(): return '{0.__globals__[__builtins__][print].__globals__}'.format(f)"]
        for program, r in zip(programs, self.ex.run([(p, "") for p in programs])):
            self.assertNotIn("passwd", r.value)
            self.assertFalse(r.ok and "0x" in r.value, (program, r))

    def test_memory_bombs(self):
        """Memory is bounded, and a bomb never hurts its neighbours, whose answers stay right."""
        bombs = [body("return [0] * 10 ** 10"), body("return 'a' * 10 ** 10"), body("return len(bytes(10 ** 10))"),
                 body("return len(list(range(10 ** 9)))"),
                 body("x = [1]\nwhile True: x += x"), body("x = 'a'\nwhile True: x += x"),
                 body("x = {}\nwhile True: x[len(x)] = [0] * 9999"),
                 body("return len(str(1 << 10 ** 10))"), body("return 10 ** 10 ** 10"),
                 body("return [[0] * 10 ** 6 for i in range(10 ** 6)]"),
                 "x = [0] * 10 ** 10\ndef f(): return 1", body("return ('%%%dd' % 10 ** 10) % 1"),
                 body("return '{:>9999999999}'.format(1)")]
        jobs = []
        for i, bomb in enumerate(bombs):
            jobs += [(bomb, ""), (f"def f(x): return [x] * {i}", "0")]
        results = self.ex.run(jobs)
        for i, bomb in enumerate(bombs):
            with self.subTest(bomb=bomb):
                self.assertIn(results[2 * i].error, ("memory", "timeout", "OverflowError", "ValueError", "TypeError"))
                self.assertEqual(results[2 * i + 1].value, repr([0] * i))
        self.assertEqual([r.error for r in results[:4:2]], ["memory", "memory"])

    def test_hangs(self):
        """Endless code is stopped in pure Python, in C code, in dunders and in teardown; swallowing changes nothing."""
        start = time.monotonic()
        self.errors([body("while True: pass"),
                     body("while True:\n    try:\n        while True: pass\n    except: pass"),
                     "while True: pass\ndef f(): return 1",
                     body("return sum(range(10 ** 15))"), "import itertools\ndef f(): return max(itertools.count())",
                     "import itertools\ndef f(): return all(itertools.repeat(1))",
                     "import re\ndef f(): return re.match('(a*)*b', 'a' * 50)", body("return 7 ** 10 ** 8 % 10"),
                     "from collections import deque\nfrom itertools import count\ndef f(): deque(count(), maxlen=0)",
                     "class A:\n    def __del__(s):\n        while True: pass\ndef f():\n    A()\n    return 1",
                     "class A:\n    def __del__(s):\n        while True: pass\na = A()\ndef f(): return 1",
                     "def g():\n    try: yield 1\n    finally:\n        while True: pass\nit = g()\n"
                     "def f(): return next(it)",
                     "class E(Exception):\n    def __del__(s):\n        while True: pass\ndef f(): raise E",
                     "class A:\n    def __eq__(s, o):\n        while True: pass\n    __hash__ = lambda s: 1\n"
                     "def f(): return len({A(), A()})",
                     "class A:\n    def __repr__(s):\n        while True: pass\ndef f(): return str(A())",
                     "def g():\n    yield from g()\ndef f():\n    while True:\n        try: next(g())\n"
                     "        except BaseException: pass"], allowed=["timeout"])
        self.assertLess(time.monotonic() - start, 8)
        quiet = ["class M(type):\n    @property\n    def __name__(c):\n        while True: pass\n"
                 "class E(Exception, metaclass=M): pass\ndef f(): raise E",
                 "class M(type):\n    def __hash__(c):\n        while True: pass\n"
                 "    def mro(c): return type.mro(c)\nclass E(KeyError, metaclass=M): pass\ndef f(): raise E",
                 "class A:\n    def __repr__(s):\n        while True: pass\ndef f(): return A()"]
        self.errors(quiet)

    def test_memory_that_comes_back(self):
        """A generator that is collected can bring its memory back, where no later collection finds it: the neighbours
        of such a program still have all of theirs."""
        hoards = ("def f(k):\n    log = []\n    def g():\n        buf = bytearray(150_000_000)\n        try:\n"
                  "            yield buf\n        finally:\n            log.append([log, buf])\n"
                  "    x = g()\n    next(x)\n    log.append(x)\n    return k")
        asks = "def f(n):\n    try:\n        return len(bytearray(n))\n    except MemoryError:\n        return 'full'"
        sizes = range(100_000_000, 100_000_006)
        results = self.ex.run([(hoards, "1"), *((asks, str(n)) for n in sizes), (hoards + "\n", "2")])
        self.assertEqual([r.value for r in results], ["1", *map(str, sizes), "2"])

    def test_spoiling_the_next_program(self):
        """State that one program leaves must not reach the next: modules, classes, builtins, registries, caches."""
        spoilers = ["import math\nmath.sqrt = lambda x: 5\ndef f(): return 1",
                    "from collections import Counter\nCounter.most_common = lambda s, n=None: 5\ndef f(): return 1",
                    "import collections\ndef f():\n    setattr(collections.Counter, 'most_common', 5)\n    return 1",
                    "import collections\ndef f():\n    collections.Counter = 5\n    return 1",
                    "len = lambda x: 5\ndef f(): return len(1)",
                    "def f():\n    global sorted\n    sorted = 5\n    return 1", body("vars()['x'] = 1\nreturn 1"),
                    body("return locals().clear()"),
                    "locals()['__builtins__']['len'] = 5\ndef f(): return 1",
                    "import math\ndef f(): vars(math)['sqrt'] = 5",
                    "from collections.abc import Sequence\ndef f():\n    Sequence.register(int)\n    return 1",
                    "import re\ndef f():\n    re.purge()\n    return 1",
                    "import functools, collections\ndef f(): functools.update_wrapper(collections.Counter, len)",
                    "import typing, collections\ndef f(): typing.final(collections.Counter)",
                    "class A:\n    def __del__(s):\n        global len\n        len = 5\na = [A()]\na.append(a)\n"
                    "def f(): return 1", "import copy\ncopy.dispatch_table[list] = 5\n"
                                         "def f(): return 1", "import string\nstring.digits = 'no'\n"
                                                              "def f(): return string.digits",
                    "import heapq\nheapq.heappush = None\ndef f(): return 1",
                    "x = []\nfor i in range(10 ** 5): x.append([x])\ndef f(): return 1",
                    "def f():\n    import math as m\n    del m.sqrt\n    return 1",
                    "def g():\n    try: yield 1\n    finally: raise SystemExit\nx = g()\nnext(x)\ndef f(): return 1"]
        witness = ("import math, re, string, heapq\nfrom collections import Counter\n"
                   "from collections.abc import Sequence\ndef f(n):\n    h = []\n    heapq.heappush(h, 1)\n"
                   "    return (math.sqrt(4), Counter('aab').most_common(1), len([1]), sorted([2, 1]),\n"
                   "            isinstance(n, Sequence), re.findall('a', 'aa'), string.digits, h, n)")
        jobs = []
        for i, spoiler in enumerate(spoilers):
            jobs += [(spoiler, ""), (witness, str(i))]
        for order in (jobs, jobs[::-1], random.Random(0).sample(jobs, len(jobs))):
            with Executor(cache_mb=0) as ex:
                for (program, args), r in zip(order, ex.run(order)):
                    if program is witness:
                        self.assertEqual(r.value,
                                         f"(2.0, [('a', 2)], 1, [1, 2], False, ['a', 'a'], '0123456789', [1], {args})")

    def test_reaching_across_a_batch(self):
        """What a program reaches through format paths, private names or memory that it leaves behind changes no
        neighbour's value, before it or after it."""
        reach = "def f(x):\n    try: '{0.__globals__[%s].zzz}'.format(%s)\n    except AttributeError as e:\n        %s"
        sequence = "from collections.abc import Sequence\ndef f(x): return isinstance(x, Sequence)"
        small = "def f(x):\n    try: return len(bytearray(60 << 20)) + x\n    except MemoryError: return 'small'"
        cases = [
            (reach % ("__builtins__", "f", "e.obj['len'] = lambda s: 42"), "def f(x): return len(x)", "[1]", "1"),
            ("import collections\n" + reach % ("_sys", "collections.namedtuple",
                                               "e.obj.modules['__main__'].judge = lambda *a: b'\\t9\\t\\t'"),
             "def f(x): return x + 1", "1", "2"),
            ("from collections.abc import Sequence\ndef f(x): Sequence._abc_registry_clear()", sequence, "'ab'",
             "True"),
            ("import typing\ndef f(x): typing.Sequence._abc_caches_clear()", sequence, "'ab'", "True"),
            ("import re\ndef f(x): re.RegexFlag._value2member_map_[10] = re.RegexFlag(0)",
             "import re\ndef f(x): return re.findall('^a', x, re.I | re.M)", "'a\\nA'", "['a', 'A']"),
            ("import typing\nfrom collections.abc import Sequence\ndef f(x):\n    typing.ABCMeta('K', (Sequence,), "
             "{'__subclasshook__': classmethod(lambda c, C: True)})", sequence, "5", "False"),
            ("def f(x):\n    keep = []\n    keep.append(keep)\n    keep.append(bytearray(200 << 20))\n    return 1",
             small, "3", str((60 << 20) + 3)),
            ("def f(x):\n    keep, n = [], 1 << 27\n    keep.append(keep)\n    while n > 255:\n"
             "        try: keep.append(bytes(n))\n        except MemoryError: n >>= 1\n    while True:\n"
             "        try: keep.append([None, None])\n        except MemoryError: return 1",
             "def f(x): return [x]", "1", "[1]"),
            ("import typing\ndef f(x): return str(typing.Literal[((True,),)])",
             "import typing\ndef f(x): return typing.get_args(typing.Literal[((1,),)])", "1", "((1,),)"),
            ("import typing\ndef g():\n    try: yield\n    finally:\n        while 1: pass\ndef f(x):\n"
             "    for _ in range(64):\n        h = g()\n        next(h)\n        typing.Optional[list[h]]",
             "from typing import Optional\ndef f(x: Optional[int]): return x + 1", "1", "2"),
            ("import re\ndef f(x): return bool(re.compile('a', 2).match('A'))",
             "import re\ndef f(x):\n    try: return bool(re.match('a', x, 2.0))\n    except TypeError: return 'no'",
             "'A'", "'no'"),
            ("import copy\nfrom collections import namedtuple\nL = []\ndef f(x):\n"
             "    try: copy.deepcopy([x], namedtuple('M', 'get')(lambda k, d: L.append(d)))\n"
             "    except TypeError: pass\n    L[0].append(1)",
             "import copy\nfrom collections import namedtuple\nL = []\ndef f(x):\n"
             "    try: copy.deepcopy([x], namedtuple('M', 'get')(lambda k, d: L.append(d)))\n"
             "    except TypeError: pass\n    return any(isinstance(d, list) and len(d) > 0 for d in L)", "1", "False"),
            ("lazy from sys import modules\ndef f(x): modules['__main__'].NUMBERS['inf'] = x",      # from 3.15 on
             "def f(x): return x", "inf", "inf"),
            ("import typing\nevil = \"__import__('sys').modules['__main__'].NUMBERS.update(inf=1)\"\n"
             "def f(x): typing.evaluate_forward_ref(typing.get_args(typing.List[evil])[0], globals={})",      # 3.14 on
             "def f(x): return x", "inf", "inf"),
            ("import typing\ndef f(x): typing.disjoint_base(typing.Sequence)",                      # from 3.15 on
             "import typing\ndef f(x): return hasattr(typing.Sequence, '__disjoint_base__')", "1", "False"),
            ("import typing\nfrom collections import Counter\ndef f(x): typing.TypeForm[int](Counter)",    # 3.15
             "from collections import Counter\ndef f(x): return hasattr(Counter, '__orig_class__')", "1", "False"),
            ("import typing\nfrom collections.abc import Sequence\ndef f(x):\n"
             "    M = typing.get_origin(typing.Type[int])(Sequence)\n"
             "    K = M('K', (Sequence,), {'__subclasshook__': classmethod(lambda c, C: True)})\n"
             "    return isinstance(5, Sequence)", sequence, "5", "False"),
            ("import string\ndef f(x): return string.Template('$a').substitute(a=1)",                # from 3.14 on
             "import string\ndef f(x): return string.Template.flags is None", "1", "False"),
            ("import re\ndef f(x): return re.I | 1 << 30",
             "import re\ndef f(x): return '{0._value2member_map_}'.format(re.I).count('0x40000000')", "1", "0"),
            ("import typing\ndef f(x): typing.Annotated[lambda: open, 'pwn']()",
             "def f(x):\n    try: return '{0.__orig_class__}'.format(open)\n    except AttributeError: return 'none'",
             "1", "'none'")]
        for attacker, victim, args, value in cases:
            with self.subTest(attacker), Executor(workers=1, cache_mb=0) as ex:
                jobs = [(victim + f"\n#{i}", args) if i % 2 else (attacker + f"\n#{i}", "0") for i in range(9)]
                self.assertEqual({r.value for r in ex.run(jobs)[1::2]}, {value})

    def test_same_answers_in_any_batch(self):
        """One a call, in batches, shuffled, and with other workers, the verdicts are the same."""
        jobs = [job for n in range(3) for job in executor.small_programs(60, seed=n)]
        jobs += [(body("return 1 / 0"), ""), (body("while True: pass"), ""), ("class A: pass\ndef f(x): return x",
                                                                              "{'a'}"),
                                                                              (body("return list(set('abc'))"), "")]
        expected = dict(zip(jobs, self.ex.run(jobs)))
        random.Random(1).shuffle(jobs)
        for workers, size in ((1, 1), (1, len(jobs)), (3, len(jobs))):
            with Executor(workers) as ex:
                got = [r for i in range(0, len(jobs), size) for r in ex.run(jobs[i:i + size])]
                self.assertEqual(dict(zip(jobs, got)), expected)

    def test_cruxeval(self):
        """All 800 published programs of CRUXEval (path in NANOAZR_CRUXEVAL) give their published outputs."""
        path = os.environ.get("NANOAZR_CRUXEVAL")
        if not path:
            self.skipTest("NANOAZR_CRUXEVAL is not set")
        with open(path) as file:
            tasks = [json.loads(line) for line in file]
        results = self.ex.run([(t["code"], t["input"]) for t in tasks])
        for t, r, gold in zip(tasks, results, self.ex.literals([t["output"] for t in tasks])):
            with self.subTest(id=t["id"]):
                self.assertTrue(r.ok and gold.ok, (r, gold))
                self.assertEqual(r.key, gold.key)

    def test_fast_enough(self):
        """Checked programs cost a thirtieth of a fresh process each, at the least, and repeats come from the cache."""
        best = cached = 0       # ratios, the best of a few rounds: seconds say nothing where other work comes and goes
        for seed in range(10):
            jobs = executor.small_programs(1000, seed=seed)
            checked, fresh, again = (timeit(call, number=1) for call in (
                lambda: self.assertTrue(all(r.ok for r in self.ex.run(jobs))),
                lambda: [subprocess.run([sys.executable, "-c", jobs[0][0]]) for _ in range(5)],
                lambda: self.ex.run(jobs)))
            best, cached = max(best, fresh / 5 / (checked / 1000)), max(cached, checked / again)
            if best > 30 and cached > 3:        # 75 and 100 on 2 quiet cores
                break
        self.assertGreater(best, 30)
        self.assertGreater(cached, 3)

    def test_one_program_compiles_once(self):
        """400 inputs of one long program, dealt among others, cost less than half of 400 such programs."""
        def program(i):
            return "def f(x):\n" + "".join(f"    if x < {-k}:\n        return x + {i}\n" for k in range(100))
        ratio = 0               # 5 to 7 in quiet; the best of a few rounds
        for seed in range(10):
            each = [(program(1000 * seed + i), str(i)) for i in range(400)]
            same = [(program(1000 * seed + 500 + i % 2), str(i)) for i in range(400)]
            each, same = (timeit(lambda: self.ex.run(jobs), number=1) for jobs in (each, same))
            ratio = max(ratio, each / same)
            if ratio > 2:
                break
        self.assertGreater(ratio, 2)


class WallTest(unittest.TestCase):
    """The kernel wall alone: the name gate off, real builtins, all loaded modules. A canary must stay as it is."""

    @classmethod
    def setUpClass(cls):
        cls.canary = tempfile.mkdtemp()
        os.chmod(cls.canary, 0o777)
        for name in "abc":
            with open(os.path.join(cls.canary, name), "w") as file:
                file.write("alive")
            os.chmod(os.path.join(cls.canary, name), 0o666)
        cls.before = cls.state()
        cls.processes = descendants(os.getpid())
        cls.ex = Executor(gate=False)

    @classmethod
    def tearDownClass(cls):
        cls.ex.close()
        shutil.rmtree(cls.canary)

    @classmethod
    def state(cls):
        def facts(path):
            s = os.stat(path)
            return path, s.st_mode, s.st_mtime_ns, s.st_size, s.st_nlink, s.st_uid
        return [facts(cls.canary)] + sorted(facts(os.path.join(cls.canary, n)) for n in os.listdir(cls.canary))

    def attack(self, lines,
               imports="import os, ctypes, signal, sys, mmap, gc, resource, time, marshal, _thread"):
        """Each line must fail to give 'harm', and a good program after it must be right."""
        programs = [f"{imports}\nC = {self.canary!r}\nlibc = ctypes.CDLL(None)\n" + body(line) for line in lines]
        jobs = [job for p in programs for job in ((p, ""), ("def f(x): return x + [2]", "[1]"))]
        results = self.ex.run(jobs)
        for line, bad, good in zip(lines, results[::2], results[1::2]):
            with self.subTest(line=line):
                self.assertNotIn("harm", bad.value)
                if "import " not in line:
                    self.assertNotIn(bad.error, ("NameError", "ModuleNotFoundError", "syntax"), "no attack was made")
                self.assertEqual(good.value, "[1, 2]")
        self.assertEqual(self.state(), self.before)
        self.assertEqual(self.ex.replaced, 0)
        return [r.error for r in results[::2]]

    def test_files(self):
        """No file can be opened, made, changed, removed, renamed, linked, listed, or asked about."""
        errors = self.attack([
            "open(C + '/a', 'w').write('x'); return 'harm'", "open(C + '/a').read(); return 'harm'",
            "os.mkdir(C + '/x'); return 'harm'", "os.unlink(C + '/a'); return 'harm'",
            "os.rename(C + '/a', C + '/z'); return 'harm'", "os.chmod(C + '/a', 0); return 'harm'",
            "os.symlink('/', C + '/l'); return 'harm'", "os.link(C + '/a', C + '/l'); return 'harm'",
            "os.truncate(C + '/a', 0); return 'harm'", "os.listdir(C); return 'harm'", "os.stat(C); return 'harm'",
            "os.utime(C + '/a'); return 'harm'", "os.rmdir(C); return 'harm'",
            "os.open(C + '/n', os.O_CREAT | os.O_WRONLY); return 'harm'", "os.mkfifo(C + '/p'); return 'harm'",
            "os.chdir(C); return 'harm'", "os.pipe(); return 'harm'", "os.memfd_create('a'); return 'harm'",
            "return 'harm' if libc.open(b'/etc/passwd', 0) >= 0 else 1 / 0",
            "return 'harm' if libc.creat(C.encode() + b'/n', 0o777) >= 0 else 1 / 0",
            "return 'harm' if libc.syscall(437, -100, b'/', b'0' * 24, 24) >= 0 else 1 / 0",
            "os.write(1, b'x' * 99); return 'harm'", "[os.write(i, b'x') for i in range(3, 200)]; return 'harm'",
            "return [os.read(i, 9) for i in range(99)] and 'harm'",
            "import socket; return 'harm'", "import json; return 'harm'"])
        self.assertNotIn("", errors)

    def test_processes_and_signals(self):
        """No fork, thread, exec, signal, trace, namespace or limit change; fork bombs die in their first call."""
        errors = self.attack([
            "while True: os.fork()", "os.fork(); return 'harm'",
            "os.execv('/bin/sh', ['sh', '-c', f'touch {C}/x']); return 'harm'",
            "os.system(f'touch {C}/x'); return 'harm'",
            "os.spawnv(os.P_WAIT, '/bin/touch', ['touch', C + '/x']); return 'harm'",
            "os.posix_spawn('/bin/sh', ['sh'], {}); return 'harm'",
            "libc.system(b'touch ' + C.encode() + b'/x'); return 'harm'",
            "_thread.start_new_thread(print, ()); return 'harm'",
            "while True: _thread.start_new_thread(print, ())", "os.kill(os.getppid(), 9); return 'harm'",
            "os.kill(-1, 9); return 'harm'",
            "os.killpg(0, 9); return 'harm'", "signal.signal(signal.SIGPROF, signal.SIG_IGN); return 'harm'",
            "signal.pthread_sigmask(0, [signal.SIGPROF]); return 'harm'",
            "resource.setrlimit(resource.RLIMIT_NOFILE, (9, 9)); return 'harm'",
            "return 'harm' if libc.ptrace(16, 1, 0, 0) >= 0 else 1 / 0",
            "return 'harm' if libc.prctl(4, 1) >= 0 else 1 / 0",
            "return 'harm' if libc.unshare(0x10000000) >= 0 else 1 / 0", "os.setuid(0); return 'harm'",
            "os.nice(-5); return 'harm'", "return 'harm' if libc.syscall(425, 8, b'0' * 120) >= 0 else 1 / 0",
            "return 'harm' if libc.syscall(435, b'0' * 88, 88) >= 0 else 1 / 0",
            "return 'harm' if libc.syscall(321, 0, 0, 0) >= 0 else 1 / 0", "time.sleep(100); return 'harm'",
            "sys.setrecursionlimit(10 ** 9)\ndef g(n): return g(n + 1)\ng(0)", "ctypes.string_at(0); return 'harm'",
            "os.abort(); return 'harm'", "os._exit(0)", "os._exit(7)", "sys.exit(); return 'harm'"])
        self.assertNotIn("", errors)
        number = {"x86_64": 15, "aarch64": 139}[os.uname().machine]     # rt_sigreturn could block the timers' signals
        self.assertEqual(self.attack([f"libc.syscall({number}); return 'harm'"]), ["forbidden"])
        self.assertEqual(descendants(os.getpid()) - self.processes - {z.pid for z in self.ex.zygotes}, set())

    def test_network(self):
        """No socket of any kind, through libc or by number."""
        errors = self.attack([
            *[f"return 'harm' if libc.socket({family}, {kind}, 0) >= 0 else 1 / 0"
              for family in (1, 2, 10, 16, 17) for kind in (1, 2, 3)],
            "x = (ctypes.c_int * 2)()\nreturn 'harm' if libc.socketpair(1, 1, 0, x) >= 0 else 1 / 0",
            "return 'harm' if libc.epoll_create(1) >= 0 else 1 / 0",
            "return 'harm' if libc.getaddrinfo(b'a.b', b'80', 0, 0) == 0 else 1 / 0"])
        self.assertEqual(set(errors), {"forbidden"})

    @unittest.skipUnless(os.uname().machine == "x86_64", "machine code of x86_64")
    def test_other_call_conventions(self):
        """The 32-bit gate (int 0x80) and the x32 numbers are no way round the filter."""
        code = ("m = mmap.mmap(-1, 4096, prot=7)\nm.write(bytes({}))\n"
                "at = ctypes.addressof(ctypes.c_char.from_buffer(m))\n"
                "return 'harm' + str(ctypes.CFUNCTYPE(ctypes.c_int)(at)())")
        errors = self.attack([code.format([0xB8, 20, 0, 0, 0, 0xCD, 0x80, 0xC3]),
                                            # mov eax, getpid; int 0x80; ret
                              code.format([0xB8, 39, 0, 0, 0x40, 0x0F, 0x05,
                                           0xC3])])           # mov eax, x32 getpid; syscall; ret
        self.assertEqual(errors, ["forbidden", "forbidden"])

    def test_a_child_taken_over(self):
        """One that writes into the shared records spoils only its own verdict; one that kills its timers ends by the
        CPU limit, and one that would sleep ends at once."""
        find = ("seen = gc.get_objects()\n"
                "area = [o for o in seen + gc.get_referents(*seen) if type(o) is mmap.mmap][0]\n")
        errors = self.attack([find + "area[:] = b'\\xff' * len(area)\nos._exit(0)",
                              find + "area[:4] = b'\\xff' * 4\nos._exit(0)",
                              find + "area[:9] = b'\\x09\\x00\\x00\\x00\\xc8\\n\\n\\n\\n'\nos._exit(0)",
                              find + "area[:8] = b'\\t\\x1b[1m\\t\\t\\n'\nos._exit(0)",     # for a terminal
                              "signal.setitimer(signal.ITIMER_PROF, 0)\nsignal.setitimer(signal.ITIMER_REAL, 0)\n"
                              "while True: pass",
                              "lock = _thread.allocate_lock()\nlock.acquire()\nlock.acquire()\nreturn 'harm'"])
        self.assertLessEqual(set(errors[:4]), {"crash", "nondeterministic"})
        self.assertNotIn("", errors)
        self.assertEqual(errors[4:], ["timeout", "forbidden"])


class LifeTest(unittest.TestCase):
    """Starting, dying, and being used from elsewhere."""

    def run_script(self, text, **how):
        return subprocess.run([sys.executable, "-c", textwrap.dedent(text)], capture_output=True, text=True, cwd=HERE,
                              timeout=60, **how)

    def test_killed_trainer_leaves_nothing(self):
        """After SIGKILL of the trainer no zygote or child is left, also when a thread that is gone started them."""
        script = textwrap.dedent("""
            import threading, time
            from executor import Executor, Result
            box = []
            thread = threading.Thread(target=lambda: box.append(Executor(timeout=60)))
            thread.start()
            thread.join()
            threading.Thread(target=box[0].run, args=([("def f():\\n    while True: pass", "")],), daemon=True).start()
            print("up", flush=True)
            time.sleep(100)""")
        trainer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=HERE)
        self.assertEqual(trainer.stdout.readline(), b"up\n")
        time.sleep(0.5)
        below = descendants(trainer.pid)
        self.assertGreaterEqual(len(below), len(executor.SEEDS) + 1)     # zygotes, and one child at least
        trainer.kill()
        trainer.wait()
        trainer.stdout.close()
        end = time.monotonic() + 5
        while any(map(alive, below)) and time.monotonic() < end:
            time.sleep(0.05)
        self.assertEqual([pid for pid in below if alive(pid)], [])

    def test_killed_workers_are_replaced(self):
        """Zygotes and children killed at random while programs run: every answer still comes, and right."""
        jobs = executor.small_programs(4000, seed=9)
        with Executor() as ex:
            expected = ex.run(jobs)
        with Executor() as ex, ThreadPoolExecutor() as pool:
            future, draw, kills = pool.submit(ex.run, jobs), random.Random(0), 0
            while not future.done():
                zygotes = [z.pid for z in ex.zygotes]
                victims = sorted(set(zygotes).union(*map(descendants, zygotes)))
                if victims and kills < 6:
                    try:
                        os.kill(draw.choice(victims), signal.SIGKILL)
                        kills += 1
                    except ProcessLookupError:
                        pass     # a child that had just ended by itself
                time.sleep(0.02)
            self.assertEqual(future.result(), expected)
            self.assertGreater(kills, 0)
            os.kill(ex.zygotes[0].pid, signal.SIGKILL)
            self.assertTrue(ex.run([("def f(): return 1234", "")])[0].ok)
            [os.kill(z.pid, signal.SIGKILL) for z in ex.zygotes]
            with unittest.mock.patch.object(ex, "start", side_effect=OSError("no more processes")):
                with self.assertRaises(OSError):
                    ex.run([("def f(): return 5678", "")])
            self.assertTrue(ex.run([("def f(): return 5678", "")])[0].ok, "a start that failed is tried again")
            self.assertGreater(ex.replaced, 0)

    def test_workers_that_cannot_start_again(self):
        """Where no worker can be had any more that is said; it is no verdict on the programs."""
        with Executor(workers=1) as ex, unittest.mock.patch.object(sys, "executable", shutil.which("false")):
            for z in ex.zygotes:
                z.kill()
            with self.assertRaisesRegex(RuntimeError, "workers die"):
                ex.run([("def f(): return 1", "")])
        with unittest.mock.patch.object(subprocess, "Popen", side_effect=OSError(24, "Too many open files")), \
                self.assertRaisesRegex(executor.Unusable, "Too many open files"):
            Executor()

    def test_descriptors_and_memory_stay_flat(self):
        """Thousands of programs (PROGRAMS=1000000: a million), errors and executors later, no descriptor is left open,
        the cache is bounded, and neither the workers nor this process has grown."""
        def fds():
            return len(os.listdir("/proc/self/fd"))

        def resident():     # MB: the workers', and ours
            return sum(megabytes(z.pid) for z in ex.zygotes), megabytes(os.getpid())

        def megabytes(pid):
            with open(f"/proc/{pid}/status") as f:
                return next(int(line.split()[1]) / 1024 for line in f if line.startswith("VmRSS"))
        with Executor(cache_mb=1) as ex:
            ex.run(executor.small_programs(4000))
            start, before = fds(), resident()
            for n in range(10, 10 + int(os.environ.get("PROGRAMS", 10_000)) // 1000):
                wrong = [("def f(): return 1 +", ""), (body("return 1 / 0"), "")]
                ex.run(executor.small_programs(1000, seed=n) + wrong)
                ex.literals([str(n)] * 10)
            self.assertEqual(fds(), start)
            self.assertLess(len(ex.cache) + len(ex.old_cache), 4000)
            if "PROGRAMS" in os.environ:
                print(f"{fds()} descriptors; workers, trainer: {before} MB, now {resident()}")
            for was, now in zip(before, resident()):
                self.assertLess(now, was + 10)
        with Executor(cache_mb=0) as ex:
            ex.run([("def f(): return 1", "")])
            self.assertFalse(ex.cache or ex.old_cache)
        before = fds()
        for _ in range(3):
            with Executor() as ex:
                ex.run([("def f(): return 1", "")])
            ex.close()
            ex.close()
        self.assertEqual(fds(), before)
        with self.assertRaises(RuntimeError):
            ex.run([("def f(): return 1", "")])

    def test_misuse(self):
        """A text of another type, settings that cannot work, and a fork of the trainer: an error that says so."""
        with self.assertRaises(ValueError):
            Executor(timeout=0)
        with self.assertRaises(ValueError):
            Executor(memory_mb=47)
        done = self.run_script("""
            import os
            from executor import Executor
            with Executor(workers=1) as ex:
                try:
                    ex.run([(b"def f(): return 1", "")])
                except TypeError:
                    print("bytes are no program")
                pid = os.fork()
                try:
                    ex.run([("def f(): return 1", "")])
                except RuntimeError:
                    os._exit(7 if not pid else 8)
                print(os.WEXITSTATUS(os.waitpid(pid, 0)[1]), ex.run([("def f(): return 2", "")])[0].value)""")
        self.assertEqual(done.stdout, "bytes are no program\n7 2\n")

    def test_from_threads(self):
        """Many threads may call one executor at once, and each gets its own answers."""
        wrong = []

        def work(n):
            jobs = [(f"def f(x): return x * {n}", str(i)) for i in range(200)]
            wrong.extend(r for i, r in enumerate(ex.run(jobs)) if r.value != str(i * n))
        with Executor(workers=1) as ex:
            threads = [threading.Thread(target=work, args=(n,)) for n in range(5)]
            [t.start() for t in threads]
            [t.join() for t in threads]
        self.assertEqual(wrong, [])

    def test_closed_while_threads_run(self):
        """close() while other threads wait for their answers: each gets them, or the RuntimeError that says so."""
        ends = []

        def work(n):
            try:
                for i in range(50):
                    ex.run([(f"def f(x): return x * {n}", str(j)) for j in range(40 * i, 40 * i + 40)])
                ends.append("done")
            except Exception as e:
                ends.append(type(e).__name__)
        ex = Executor(workers=1)
        threads = [threading.Thread(target=work, args=(n,)) for n in range(12)]
        [t.start() for t in threads]
        time.sleep(0.2)
        ex.close()
        [t.join(20) for t in threads]
        self.assertFalse(any(t.is_alive() for t in threads))
        self.assertLessEqual(set(ends), {"done", "RuntimeError"})

    def test_closed_while_a_worker_is_replaced(self):
        """close() while a dead zygote's successor starts: run() says so, and the successor ends too."""
        ex = Executor(workers=1)
        real, new = ex.start, []

        def start(i):
            new.append(real(i))
            closer = threading.Thread(target=ex.close)          # it waits for the lane that this runs in
            closer.start()
            while ex.zygotes:
                time.sleep(0.001)
            return new[-1]
        ex.zygotes[0].kill()
        with unittest.mock.patch.object(ex, "start", start), self.assertRaisesRegex(RuntimeError, "closed"):
            ex.run([("def f(): return 5", "")])
        self.assertIsNotNone(new[0][0].poll())

    def test_refuses_without_a_wall(self):
        """Where the kernel refuses seccomp it says so and names the flag; with that it runs and warns, alone too."""
        script = """
            import ctypes, struct
            code = [(0x20, 0, 0, 0), (0x15, 0, 3, {prctl}), (0x20, 0, 0, 16), (0x15, 0, 1, 22),     # prctl(22, ...)
                    (6, 0, 0, 0x50016), (6, 0, 0, 0x7fff0000)]                                      # fails
            code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *c) for c in code))
            program = ctypes.create_string_buffer(struct.pack("HP", 6, ctypes.addressof(code)))
            libc = ctypes.CDLL(None)
            assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program, 0,
                                                                  0) == 0     # no more filters from here on
            import subprocess, sys
            from executor import Executor
            try:
                Executor()
            except RuntimeError as e:
                print(e)
            with Executor(unsafe=True) as ex:
                print(ex.run([("def f(): return 5", ""), ("def f():\\n    while True: pass", ""),
                              ("def f(): return open('/etc/passwd')", ""), ("def f(): return [0] * 10 ** 10", "")]))
            for flags in [], ["--unsafe_executor"]:
                done = subprocess.run([sys.executable, "executor.py", *flags], capture_output=True, text=True)
                print(done.returncode, "Traceback" in done.stderr, "programs a second" in done.stdout)
        """.format(prctl={"x86_64": 157, "aarch64": 167}[os.uname().machine])
        done = self.run_script(script)
        self.assertIn("--unsafe_executor", done.stdout, done.stderr)
        self.assertEqual(done.stdout.split("\n")[2:], ["1 False False", "0 False True", ""])
        for text in ("value='5'", "error='timeout'", "error='forbidden'", "error='memory'"):
            self.assertIn(text, done.stdout)
        self.assertIn("NO KERNEL WALL", done.stderr)

    def test_as_a_normal_user(self):
        """The wall stands for a normal user as for root, also under a limit of memory that he may not raise."""
        who = {} if os.getuid() else {"user": 65534, "group": 65534, "extra_groups": []}

        def runs(python):
            try:
                return subprocess.run([python, "-c", "0"], cwd="/", capture_output=True, **who).returncode == 0
            except OSError:
                return False
        python = next(filter(runs, filter(None, (sys.executable, shutil.which("python3", path="/usr/bin")))), None)
        if not python:
            self.skipTest("no python here that a normal user may run")
        with tempfile.TemporaryDirectory() as folder:
            os.chmod(folder, 0o755)
            shutil.copy(executor.__file__, folder)
            for limit in "", "resource.setrlimit(resource.RLIMIT_AS, (200 << 20, 200 << 20))":    # a worker wants more
                script = ("from executor import *\n" + limit +
                          "\nwith Executor() as ex: print(ex.run([('def f(): return 5', '')]))")
                done = subprocess.run([python, "-c", script], cwd=folder, capture_output=True, text=True, timeout=30,
                                      **who)
                self.assertIn("value='5'", done.stdout, done.stderr)

    def test_shows_itself(self):
        """`python executor.py` gives its verdicts, in 80 columns."""
        done = subprocess.run([sys.executable, "executor.py"], capture_output=True, text=True, cwd=HERE, timeout=60)
        self.assertEqual(done.returncode, 0, done.stderr)
        for word in ("timeout", "forbidden", "nondeterministic", "memory", "syntax"):
            self.assertIn(word, done.stdout)
        self.assertLessEqual(max(map(len, done.stdout.splitlines())), 80)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring: figures, task files, checkpoints, comparisons, the report


CONFIG = {"seed": 1, "n_inputs": 6, "large": False, "max_new": 24, "suite_n": 3, "samples": 4, "block_size": 320,
          "steps": 3}


def tiny_gpt(seed=0, **more):
    torch.manual_seed(seed)
    return GPT(GPTConfig(n_layer=1, n_embd=32, n_head=2, n_kv_head=1, **more))


def save_run(folder, config=None, **changes):
    """A run's folder as train.py leaves it, with a tiny untrained model."""
    model = tiny_gpt()
    data = {"version": evaluation.VERSION, "config": CONFIG, "gpt": asdict(model.config), "model": model.state_dict(),
            "base": tiny_gpt(1).state_dict(), "step": 3, **changes}
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(CONFIG if config is None else config, f)
    torch.save(data, os.path.join(folder, "ckpt.pt"))
    return model


def call_eval(*argv):
    """(exit code, stdout, stderr) of eval.main in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            evaluation.main([str(a) for a in argv])
            code = 0
        except SystemExit as e:
            code = e.code
    return code, out.getvalue(), err.getvalue()


def made_up_measure(skill, n=20):
    """measure()'s result with invented counts: the same for equal skill."""
    rng, table, counts = np.random.default_rng(int(1000 * skill)), {}, {}
    for k in KINDS:
        for d in map(str, range(1, 7)):
            right = rng.binomial(16, skill, n)
            greedy = (rng.random(n) < skill).astype(int)
            table.setdefault(k, {})[d] = {"greedy": float(greedy.mean()), "pass@1": float(right.mean() / 16), "n": n,
                                          "greedy_ci": evaluation.interval([greedy]),
                                          "pass@1_ci": evaluation.interval([right / 16]),
                                          "pass@16": float(evaluation.pass_at_k(right, 16, 16).mean())}
            counts.setdefault(k, {})[d] = {"greedy": greedy.tolist(), "right": right.tolist(), "samples": 16}
    return {"table": table, "counts": counts, "people": {k: {"greedy": 0.1, "pass@1": 0.1, "n": 40} for k in KINDS}}


def made_up_run(folder, seed, skill, **config):
    os.makedirs(folder)
    for name, data in (("config.json", {**CONFIG, "seed": seed, **config}),
                       ("eval.json", evaluation.join(made_up_measure(0.4), made_up_measure(skill)))):
        with open(os.path.join(folder, name), "w") as f:
            json.dump(data, f)
    with open(os.path.join(folder, "metrics.jsonl"), "w") as f:
        for step in range(3):
            f.write(json.dumps({"phase": "selfplay", "step": step, "rollouts": 1000 * seed, "minutes": 2.0}) + "\n")


class TestFigures(unittest.TestCase):
    def test_device_bench(self):
        """What --bench asks of a GPU runs, here on a small network on the CPU, and every figure of it is one."""
        cfg, _ = train.parse(["--preset", "smoke", "--device", "cpu", "--dtype", "float32"])
        for name, value in evaluation.bench_device(cfg, tasks=4, size=64).items():
            self.assertTrue(0 < value < math.inf, name)

    def test_pass_at_k_equals_counting_subsets(self):
        """pass@k is the share of k-subsets of the n samples that hold a right one."""
        for n, k in ((1, 1), (4, 1), (5, 3), (6, 6), (7, 4)):
            for right in range(n + 1):
                subsets = list(itertools.combinations([i < right for i in range(n)], k))
                self.assertAlmostEqual(evaluation.pass_at_k([right], n, k)[0], np.mean([any(s) for s in subsets]))

    def test_interval_covers_the_mean_and_shrinks(self):
        """The interval holds the mean, is repeatable, narrows with n, and is about two standard errors each way."""
        x = np.random.default_rng(0).random(400) < 0.3
        low, high = evaluation.interval([x])
        self.assertEqual([low, high], evaluation.interval([x]))
        self.assertLess(low, x.mean())
        self.assertGreater(high, x.mean())
        self.assertAlmostEqual(high - low, 2 * 1.96 * x.std() / 20, delta=0.005)
        wide = evaluation.interval([x[:50]])
        self.assertGreater(wide[1] - wide[0], 2 * (high - low))
        self.assertEqual(evaluation.interval([np.ones(9)]), [1, 1])

    def test_interval_covers_95_in_100(self):
        """Of 200 samples of 100 coin tosses about 95 % have an interval that holds the truth."""
        rng = np.random.default_rng(1)
        ends = [evaluation.interval([rng.random(100) < 0.6], draws=500) for _ in range(200)]
        self.assertAlmostEqual(np.mean([low <= 0.6 <= high for low, high in ends]), 0.95, delta=0.03)

    def test_pairing_cancels_what_the_tasks_differ_in(self):
        """A gain of one more right sample on every task has an interval of width 0, however the tasks differ."""
        base = made_up_measure(0.4)
        final = copy.deepcopy(base)
        for k in KINDS:
            for d in base["table"][k]:
                c = final["counts"][k][d]
                c["right"] = [r + 1 for r in c["right"]]
                final["table"][k][d]["pass@1"] += 1 / 16
        result = evaluation.join(base, final)
        rise, ci = evaluation.gain(result, "pass@1")
        self.assertAlmostEqual(rise, 1 / 16)
        self.assertEqual(ci, [0.0625, 0.0625])
        del result["counts"]
        self.assertIsNone(evaluation.gain(result, "pass@1")[1])

    def test_table_fits_80_columns(self):
        """The table fits a terminal, with every figure at its widest, and with a base, people or counts missing."""
        a, b = made_up_measure(0.0), made_up_measure(1.0)
        for lines in map(evaluation.table_lines, (evaluation.join(a, b), {"final": b["table"]}, {})):
            self.assertLessEqual(max(map(len, lines)), 80)
            self.assertGreater(len(lines), 20)


class TestMeasures(unittest.TestCase):
    def test_depths_of_the_means(self):
        """The figure by which runs are compared leaves depth 6 out; the deep one is of depths 4 to 6."""
        table = {k: {str(d): {"m": d} for d in range(1, 7)} for k in KINDS}
        self.assertEqual([evaluation.mean_at(table, "m", *evaluation.MEAN_CELLS[k]) for k in ("all", "deep")], [3, 5])

    def test_interval_of_a_gain(self):
        """A gain's interval is of its own kind's cells, with its own sign, and holds the gain; that of many cells is
        narrower than that of one."""
        result = evaluation.join(made_up_measure(0.4), made_up_measure(0.6))
        for m in ("greedy", "pass@1"):
            widths = {}
            for over in ("deduction", "induction", "all", "deep"):
                rise, (low, high) = evaluation.gain(result, m, over)
                self.assertTrue(low < rise < high, (m, over))
                widths[over] = high - low
            self.assertLess(widths["all"], widths["deduction"])
        cell = {"greedy": [1, 0, 1], "right": [0, 1, 16], "samples": 16}
        for m, want in (("greedy", [1, 0, 1]), ("pass@1", [0, 1 / 16, 1]), ("pass@16", [0, 1, 1])):
            self.assertEqual(evaluation.shares(cell, m).tolist(), want)
        cell = np.arange(10) % 2
        low, high = evaluation.interval([cell, cell + 5])
        self.assertTrue(2.5 < low < 3 < high < 3.5)

    def test_spread(self):
        """Mean, deviation with Bessel's factor, and Student's half width, by hand for 3 seeds."""
        mean, std, half = evaluation.spread([1.0, 2.0, 6.0])
        self.assertEqual(mean, 3.0)
        self.assertAlmostEqual(std, 7 ** 0.5)
        self.assertAlmostEqual(half, 4.30 * (7 / 3) ** 0.5)
        self.assertIsNone(evaluation.mean([1.0, None]))

    def rows(self, *given):
        """Runs as read_runs gives them, from (name, seed, gain, more of the setting)."""
        return [{"name": n, "setting": more, "seed": str(seed), "command": "", "start": 0.3, "rollouts": 1.0,
                 "minutes": 1.0, "pass@1": 0.5, "record": {}, **{f"ci {m}": None for m in evaluation.COMPARED},
                 **{f"gain {m}": g for m in evaluation.COMPARED}} for n, seed, g, more in given]

    def test_difference_and_its_interval(self):
        """`minus` is row less first row, its half width Student's over the pairs; without `full` the row of the most
        seeds leads; runs from other start networks have a table of their own."""
        (a, b), = evaluation.group_runs(self.rows(("b", 1, 0.3, {}), ("b", 2, 0.5, {}), ("a", 1, 0.2, {}),
                                                  ("a", 2, 0.3, {}), ("a", 3, 0.1, {})))
        self.assertEqual((a["name"], b["name"]), ("a", "b"))
        self.assertAlmostEqual(b["over pass@1"], 0.15)
        self.assertAlmostEqual(b["over pass@1 half"], evaluation.spread([0.1, 0.2])[2])
        for field in set(evaluation.BASE_FIELDS) - {"seed"}:
            tables = evaluation.group_runs(self.rows(("a", 1, 0.2, {field: 1}), ("b", 1, 0.3, {field: 2})))
            self.assertEqual(len(tables), 2, field)

    def test_what_the_charts_are_given(self):
        """Bars: the first and the last third of the run; before and after: each end's own figures; the tile: the
        minutes of the last step; hidden pairs are the second half; a small evaluation stands behind its step."""
        rates = [[8, 0, 0]] * 2 + [[0, 8, 0]] * 2 + [[0, 0, 8]] * 2
        records = [{"step": i, "minutes": 1.0 + i, "rates": {"deduction": r}} for i, r in enumerate(rates)]
        drawn = []
        with unittest.mock.patch.object(evaluation, "chart", lambda title, unit, lines, *a, **k: drawn.append(lines)):
            evaluation.rate_bars(records, "deduction")
            evaluation.before_after(evaluation.join(made_up_measure(0.2), made_up_measure(0.8)), "deduction")
        bars, ends = drawn
        self.assertEqual(bars, {"first third": [(0, 1), (0.5, 0), (1, 0)], "last third": [(0, 0), (0.5, 0), (1, 1)]})
        for m in ("pass@1", "greedy"):
            self.assertTrue(all(a[1] < b[1] for a, b in zip(ends[f"{m} before"], ends[f"{m} after"])))
        self.assertIn('<div class="big">6.0</div>minutes', evaluation.tiles(records, {}))
        card = evaluation.task_card(0, {"kind": "induction", "program": "", "rate": 0, "inputs": list("1234"),
                                        "outputs": list("5678"), "tries": []})
        self.assertIn("<dt>pair</dt><dd>2 -&gt; 6</dd><dt>hidden pair</dt><dd>3 -&gt; 7</dd>", card)
        record = {"step": 14, "eval": {"deduction": {"greedy": 0.5}}}
        self.assertEqual(evaluation.held_out([record], {}, "greedy", "deduction"), [(15, 0.5)])

    @only_one_of_the_people
    def test_before_is_the_base(self):
        """RUN measures the start network as `base` and the trained one as `final`."""
        with tempfile.TemporaryDirectory() as d:
            trained, seen = save_run(d), []

            def measure(model, *rest):
                seen.append(torch.equal(model.head.weight, trained.head.weight))
                return made_up_measure(0.4)
            with unittest.mock.patch.object(evaluation, "measure", measure), \
                    unittest.mock.patch.object(evaluation, "print_result", lambda *a: None):
                self.assertEqual(call_eval(d)[0], 0)
        self.assertEqual(seen, [False, True])


class TestSuite(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.ex = Executor(workers=1)
        cls.addClassCleanup(cls.ex.close)

    def test_suite_is_fixed_and_verifies(self):
        """Two builds are equal, and the executor confirms every gold output of the suite."""
        suite, again = (evaluation.build_suite(self.ex, 4, 6) for _ in range(2))
        self.assertEqual(suite, again)
        self.assertEqual({key: len(tasks) for key, tasks in suite.items()},
                         {(k, d): 4 for k in KINDS for d in range(1, 7)})
        tasks = [t for tasks in suite.values() for t in tasks]
        results = self.ex.run([(t.program, i) for t in tasks for i in t.inputs])
        self.assertEqual([r.key for r in results], [key for t in tasks for key in t.keys])

    def test_what_is_asked(self):
        """Greedy asks once at temperature 0, pass@k at 1; a right reply is counted for its own task, also behind one
        that was not asked; too_long counts those; a prompt that just fits is asked."""
        (a, _), (b, _) = selfplay.make_tasks(self.ex, [
            ("deduction", "def f(x):\n    return x" + " + 1" * n, ["1"], "") for n in (30, 0)])
        room, calls = len(selfplay.solve_prompt(b)) + 24, []

        def oracle(model, wanted, max_new, temperature, tries, seed, dtype):
            calls.append((len(wanted), temperature, tries))
            return [[ANSWER, *encode("1"), END]] * (len(wanted) * tries), None
        with unittest.mock.patch.object(evaluation, "generate", oracle):
            cell, counts = (x["deduction"]["1"] for x in evaluation.evaluate(
                tiny_gpt(block_size=room), self.ex, {("deduction", 1): [a, b]}, 24, 4))
        self.assertEqual(calls, [(1, 0.0, 1), (1, 1.0, 4)])
        self.assertEqual(counts, {"greedy": [0, 1], "right": [0, 4], "samples": 4})
        self.assertEqual((cell["too_long"], cell["pass@4"], cell["pass@1"]), (1, 0.5, 0.5))
        self.assertEqual(cell["pass@1_ci"], evaluation.interval([[0, 1]]))

    def test_deep_programs_hardly_repeat(self):
        """At depth 3 and more no program of a cell stands twice, so that n tasks are n tasks."""
        suite = evaluation.build_suite(self.ex, 12, 6)
        for (_, depth), tasks in suite.items():
            if depth >= 3:
                self.assertEqual(len({t.program for t in tasks}), len(tasks))

    def test_people_are_fit_tasks(self):
        """PEOPLE holds 36 or more different functions; each gives an induction task with hidden pairs worth hiding."""
        tasks = evaluation.people_suite(self.ex, 6)
        self.assertGreaterEqual(len({t.program for t in tasks}), 36)
        self.assertEqual(len(tasks), 3 * len({t.program for t in tasks}))
        for t in tasks:
            self.assertNotIn("  # ", t.program)
            if t.kind == "induction":
                self.assertEqual(len(set(t.inputs)), 6, t.program)
                self.assertGreater(len(set(t.keys[3:])), 1, t.program)

    def test_right_answers_are_counted_right(self):
        """A stand-in sampler that always answers a deduction task's output scores 1, and one that does not, 0."""
        suite = {("deduction", 1): evaluation.build_suite(self.ex, 4, 6)["deduction", 1]}
        prompts = {tuple(evaluation.solve_prompt(t)): t for t in suite["deduction", 1]}
        real, model = evaluation.generate, tiny_gpt()

        def oracle(model, wanted, max_new, temperature, tries, seed, dtype):
            answer = [encode(prompts[tuple(p)].outputs[0]) if temperature else [1] for p in wanted]
            return [[ANSWER, *a, END] for a in answer for _ in range(tries)], None
        evaluation.generate = oracle
        try:
            cell, counts = (x["deduction"]["1"] for x in evaluation.evaluate(model, self.ex, suite, 24, 4))
        finally:
            evaluation.generate = real
        self.assertEqual((cell["greedy"], cell["pass@1"], cell["pass@4"], cell["n"]), (0, 1, 1, 4))
        self.assertEqual(counts, {"greedy": [0] * 4, "right": [4] * 4, "samples": 4})

    def test_prompts_without_room_count_as_wrong(self):
        """A task whose prompt leaves no room for a reply is not dropped: it is wrong, and counted."""
        tasks = evaluation.build_suite(self.ex, 3, 6)["deduction", 6]
        table, _ = evaluation.evaluate(tiny_gpt(block_size=32), self.ex, {("deduction", 6): tasks}, 24, 4)
        cell = table["deduction"]["6"]
        self.assertEqual((cell["greedy"], cell["pass@4"], cell["n"], cell["too_long"]), (0, 0, 3, 3))


class TestTaskFile(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.ex = Executor(workers=1)
        cls.addClassCleanup(cls.ex.close)

    def read(self, data):
        with tempfile.TemporaryDirectory() as d:
            path = os.path.join(d, "tasks.jsonl")
            with open(path, "wb") as f:
                f.write(data)
            err = io.StringIO()
            with contextlib.redirect_stderr(err):
                tasks, bad = evaluation.read_tasks(self.ex, path)
            return tasks, bad, err.getvalue()

    def test_hostile_lines_are_named_and_the_rest_runs(self):
        """Every kind of bad line is named by its number, and the good ones around it still become tasks."""
        def line(code, arg, output, **more):
            return json.dumps({"code": code, "input": arg, "output": output, "id": "x", **more}).encode()
        good = line("def f(a, b):\n    return [a, b]", "1, 'x'", "[1, 'x']")
        lines = [good, b"", b"not json", b"[1, 2]", line(1, "1", "1"), b'{"code": "def f(x): return x"}',
                 b"\xff\xfe\x00", line("def f(x): return x", "1", "2"), line("def f(x) return x", "1", "1"),
                 line("def f(x): return x", "1", "no literal"), line("while True: pass\ndef f(x): return x", "1", "1"),
                 line("def f(x): return x", "'\ud800'", "1"), b'{"code": "' + b"a" * (1 << 21), b"[" * 100_000,
                 b'{"code": ' + b"9" * 10_000 + b"}", line("def f(x): return x", "1", "1 " + "x" * 100_000),
                 line("def f(x):\n    return '<|end|>' + x", "'<|answer|>'", "'<|end|><|answer|>'"), good]
        tasks, bad, err = self.read(b"\n".join(lines))
        self.assertEqual(len(tasks), 6)
        self.assertEqual(bad, 15)
        named = sorted(int(text.split(" line ")[1].split(":")[0]) for text in err.strip().split("\n"))
        self.assertEqual(named, list(range(2, 17)))
        self.assertLess(max(map(len, err.split("\n"))), 250)
        self.assertEqual(tasks[0].outputs, ["[1, 'x']"])

    def test_a_good_file_has_no_bad_lines(self):
        """A final line end, Windows line ends and a byte order mark are not errors; the id may be missing."""
        row = b'{"code": "def f(x):\\n    return x", "input": "1", "output": "1.0"}'
        tasks, bad, err = self.read(b"\xef\xbb\xbf" + row + b"\r\n" + row + b"\r\n")
        self.assertEqual((len(tasks), bad, err), (4, 0, ""))

    def test_from_the_command_line(self):
        """One good line is enough for exit code 0 and both kinds; an empty, missing or hopeless file exits 2."""
        with tempfile.TemporaryDirectory() as d:
            save_run(d)
            file = os.path.join(d, "t.jsonl")
            with open(file, "w") as f:
                f.write('x\n{"code": "def f(x):\\n    return x", "input": "1", "output": "1", "id": 1}\n')
            code, out, err = call_eval(d, "--tasks", file)
            self.assertEqual(code, 0)
            self.assertIn("1 tasks, 1 lines skipped", out)
            self.assertTrue("deduction" in out and "abduction" in out and "line 1" in err)
            for text in ("", "\n", "nothing\n"):
                with open(file, "w") as f:
                    f.write(text)
                code, out, err = call_eval(d, "--tasks", file)
                self.assertEqual((code, out), (2, ""))
                self.assertTrue(err.split("\n")[-2].startswith("error: "))
            self.assertEqual(call_eval(d, "--tasks", file + ".none")[0], 2)


FUZZ = int(os.environ.get("FUZZ", 600))   # inputs an edge; FUZZ=100000 python test_azr.py TestFuzz


def mutated(rng, text):
    """The text with one to six places replaced, dropped, doubled or moved: nearly what was meant."""
    for _ in range(rng.randint(1, 6)):
        k, n = rng.randrange(len(text) + 1), rng.randint(0, 12)
        text = rng.choice((text[:k] + rng.choice('"{}[]\\:,019eE.-+ \t\n\x00\u00e9\ud800<&') + text[k + 1:],
                           text[:k] + text[k + n:], text[:k] + text[k:k + n] * 2 + text[k + n:],
                           text[k:] + text[:k], text[:k] + rng.choice(("null", "1e999", "[[", "9" * 30)) + text[k:]))
    return text


class TestFuzz(unittest.TestCase):
    """Random and mutated input at each edge: a result, or one line and exit code 2; never another exception."""

    def edge(self, call, *args):
        """Whether the call returned; a refusal must be exit code 2 and one line."""
        err = io.StringIO()
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
            try:
                call(*args)
                return True
            except SystemExit as stop:
                self.assertEqual(stop.code, 2, args)
        self.assertEqual(err.getvalue().count("\n"), 1, err.getvalue())
        return False

    def test_flags(self):
        """Command lines of real flags with wild values."""
        rng, names = random.Random(0), [f.name for f in train.fields(train.Config)] + ["preset", "ablation", "sead", ""]
        wild = ["", "0", "1", "-1", "3", "0.5", "nan", "1e999", "-inf", "9" * 400, "true", "trr", "cpu", "gpu", "full",
                "deduction,deduction", "é\ud800", "\x00", "[]", "--", "=", "1_0", "٣"]
        passed = 0
        for _ in range(FUZZ):
            argv = [a for _ in range(rng.randint(1, 3)) for a in (
                ("--" + rng.choice(names), rng.choice(wild)) if rng.random() < 0.7 else
                (mutated(rng, "--steps=12"),))]
            if "--help" not in argv and "-h" not in argv:
                passed += self.edge(train.parse, argv)
        self.assertTrue(0 < passed < FUZZ)

    def test_config_files(self):
        """config.json of a run to resume, edited by a stranger."""
        rng, good = random.Random(1), json.dumps(train.asdict(train.Config()))
        passed = 0
        with tempfile.TemporaryDirectory() as d:
            for _ in range(FUZZ):
                with open(os.path.join(d, "config.json"), "w", encoding="utf-8", errors="surrogatepass") as f:
                    f.write(mutated(rng, good))
                passed += self.edge(lambda: train.check(train.read_config(d)))
        self.assertTrue(0 < passed < FUZZ)

    def test_task_files(self):
        """--tasks: each mutated line is run or named, none is lost."""
        rng = random.Random(2)
        row = json.dumps({"code": "def f(x):\n    return x", "input": "1", "output": "1", "id": "a"})
        with tempfile.TemporaryDirectory() as d, executor.Executor(workers=2, timeout=0.2) as ex:
            path, left = os.path.join(d, "tasks.jsonl"), FUZZ
            while left > 0:
                lines = [mutated(rng, row).replace("\n", " ") + "\n" for _ in range(min(left, 2000))]
                with open(path, "w", encoding="utf-8", errors="surrogatepass") as f:
                    f.writelines(lines)
                with contextlib.redirect_stderr(io.StringIO()) as err:
                    tasks, bad = evaluation.read_tasks(ex, path)
                self.assertEqual(len(tasks) // 2 + bad, len(lines))
                self.assertEqual(len(err.getvalue().strip().split("\n")), bad)
                left -= len(lines)

    def test_reports(self):
        """A run's folder with each file mutated still gives a page in which no tag was smuggled, or one line."""
        rng, row = random.Random(3), {"phase": "selfplay", "step": 1, "minutes": 1.0, "rollouts": 9,
                                      "solve": {k: 0.5 for k in KINDS}, "rates": {k: [1, 2, 3] for k in KINDS},
                                      "reward": {"solve/deduction": 0.1}, "tasks": [
                                          {"kind": "deduction", "program": "<script>", "inputs": ["1"], "outputs": [],
                                           "message": "", "rate": 0.5, "tries": [
                                               {"reply": "<img>", "answer": None, "verdict": "wrong"}]}]}
        with tempfile.TemporaryDirectory() as d:
            made_up_run(os.path.join(d, "run"), 1, 0.6)
            run, passed = os.path.join(d, "run"), 0
            good = {name: pathlib.Path(run, name).read_text() for name in ("config.json", "eval.json")}
            good["metrics.jsonl"] = (json.dumps(row) + "\n") * 2
            for n in range(max(1, FUZZ // 3)):       # a page reads three files
                for name, text in good.items():
                    with open(os.path.join(run, name), "w", encoding="utf-8", errors="surrogatepass") as f:
                        f.write(mutated(rng, text) if rng.random() < 0.8 else text)
                if self.edge(evaluation.report, run):
                    passed += 1
                    page = pathlib.Path(run, "report.html").read_text(encoding="utf-8")
                    self.assertNotIn("<script", page)
                    self.assertNotIn("<img", page)
            self.assertGreater(passed, 0)


class TestLoading(unittest.TestCase):
    def setUp(self):
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.folder, self.file = scratch.name, os.path.join(scratch.name, "ckpt.pt")

    def refused(self):
        return refusal(self, evaluation.load_run, self.folder)

    def test_a_full_disk(self):
        """A checkpoint that finds no room is an OSError, as for any file; the one before stays, nothing else does."""
        evaluation.save(self.file, {"x": torch.ones(9)})
        before, limits = pathlib.Path(self.file).read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))     # Python ignores the signal: write() fails
        try:
            with self.assertRaises(OSError):
                evaluation.save(self.file, {"x": torch.ones(10_000)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        self.assertEqual((os.listdir(self.folder), pathlib.Path(self.file).read_bytes()), (["ckpt.pt"], before))

    def test_a_whole_one_loads(self):
        """What was saved is what is loaded."""
        model = save_run(self.folder)
        config, loaded, base = evaluation.load_run(self.folder)
        self.assertEqual(config, {**CONFIG, "step": 3})
        self.assertTrue(all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters())))
        self.assertFalse(torch.equal(base.head.weight, loaded.head.weight))

    def test_truncated_and_flipped(self):
        """A cut file is refused; a flipped byte is refused or touched no weight (torch alone would load it)."""
        model = save_run(self.folder)
        with open(self.file, "rb") as f:
            whole = f.read()
        for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
            with open(self.file, "wb") as f:
                f.write(whole[:size])
            self.refused()
        rng, refused = random.Random(0), 0
        for _ in range(60):
            data = bytearray(whole)
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            with open(self.file, "wb") as f:
                f.write(data)
            try:
                with contextlib.redirect_stderr(io.StringIO()):
                    loaded = evaluation.load_run(self.folder)[1]
                self.assertTrue(all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters())))
            except SystemExit as e:
                self.assertEqual(e.code, 2)
                refused += 1
        self.assertGreater(refused, 45)

    def test_foreign_files(self):
        """Code in a pickle does not run, and other versions, shapes, types and numbers are refused in one line."""
        mark = os.path.join(self.folder, "bomb")

        class Bomb:
            def __reduce__(self):
                return os.mkdir, (mark,)
        save_run(self.folder)
        for data in (pickle.dumps(Bomb()), b"hello", b"PK\x03\x04" + b"\0" * 100):
            with open(self.file, "wb") as f:
                f.write(data)
            self.refused()
        state = tiny_gpt().state_dict()
        gpt = asdict(tiny_gpt().config)
        name = "blocks.0.qkv.weight"
        for change in ({"version": 1}, {"model": None}, {"model": {}}, {"gpt": None}, {"gpt": {}}, {"gpt": [1]},
                       {"gpt": {**gpt, "n_layer": 10 ** 9}}, {"gpt": {**gpt, "n_layer": 60_000}},
                       {"gpt": {**gpt, "n_embd": 65536}}, {"gpt": {**gpt, "n_head": 0}},
                       {"gpt": {**gpt, "n_kv_head": 3}}, {"gpt": {**gpt, "norm_eps": float("inf")}},
                       {"gpt": {**gpt, "rope_theta": float("nan")}}, {"gpt": {**gpt, "vocab_size": 7}},
                       {"gpt": {**gpt, "qk_norm": 1}}, {"model": {**state, name: state[name][:5]}},
                       {"model": {**state, name: state[name] * float("nan")}},
                       {"model": {**state, name: state[name].int()}},
                       {"model": {**state, name: "x"}}, {"model": {**state, "more": state[name]}}, {"base": {}},
                       {"base": None}, {"model": {**state, name: torch.zeros(1).expand(state[name].shape)}},
                       {"version": torch.zeros(2)}, {"model": {**state, name: state[name].double() * 1e300}},
                       {"model": {**state, "blocks.0.norm1.weight": state["norm.weight"]}}):
            save_run(self.folder, **change)
            self.refused()
        torch.save([1, 2], self.file)
        self.refused()
        torch.save({"version": evaluation.VERSION, "model": Bomb()}, self.file)
        self.refused()
        self.assertFalse(os.path.exists(mark))

    def test_foreign_configs(self):
        """config.json: missing, torn, no object, a field missing, of another type or out of range."""
        save_run(self.folder)
        for text in ("", "{", "[]", "null", "[" * 100_000, json.dumps({**CONFIG, "seed": "1"}),
                     json.dumps({**CONFIG, "suite_n": "1"}), json.dumps({**CONFIG, "seed": -1}),
                     json.dumps({**CONFIG, "large": 1}), json.dumps({**CONFIG, "samples": 10 ** 30}),
                     json.dumps({**CONFIG, "n_inputs": 1}),
                     json.dumps({k: v for k, v in CONFIG.items() if k != "max_new"})):
            with open(os.path.join(self.folder, "config.json"), "w") as f:
                f.write(text)
            self.refused()
        os.remove(os.path.join(self.folder, "config.json"))
        self.refused()
        save_run(self.folder)
        os.remove(self.file)
        self.assertIn("ckpt.pt", self.refused())


COMPARE_FILES = ("compare.md", "compare.csv", "curves.svg")


class TestCompare(unittest.TestCase):
    def test_groups_by_setting_and_pairs_by_seed(self):
        """Runs that differ in the seed alone share a row; its mean, spread and gain are those computed by hand."""
        with tempfile.TemporaryDirectory() as d:
            runs = [os.path.join(d, name) for name in ("a1", "a2", "b1", "c1")]
            made_up_run(runs[0], 1, 0.5, name="full", command="python train.py | tee log")
            made_up_run(runs[1], 2, 0.6, name="full")
            made_up_run(runs[2], 1, 0.7, name="full", lr=0.1)
            made_up_run(runs[3], 1, 0.4, name="<img onerror=x>|\n", lr=0.2)
            code, out, err = call_eval("--compare", *runs, runs[0], os.path.join(d, "none"), "--out",
                                       os.path.join(d, "out"))
            self.assertEqual(code, 0)
            self.assertIn("none: no finished run", err)
            self.assertIn("a1: setting and seed of a run before it", err)
            table = [[c.strip() for c in line.replace("\\|", "/").split("|")[1:-1]] for line in out.split("\n")
                     if line.startswith("|")][2:]
            self.assertEqual([row[:2] for row in table], [["full (lr=off)", "2"], ["full (lr=0.1)", "1"],
                                                          ["<img onerror=x>/", "1"]])
            base, *finals = [evaluation.mean_at(made_up_measure(skill)["table"], "pass@1",
                                                *evaluation.MEAN_CELLS["all"]) for skill in (0.4, 0.5, 0.6)]
            mean, std = 100 * np.mean(finals), 100 * np.std(finals, ddof=1)
            self.assertEqual(table[0][2], f"{mean:.1f} \u00b1 {std:.1f}")
            half = 12.71 * std / 2 ** 0.5                                  # Student's t with one degree of freedom
            self.assertEqual(table[0][3], f"{mean - 100 * base:+.1f} [{mean - 100 * base - half:+.1f}, "
                                          f"{mean - 100 * base + half:+.1f}]")
            self.assertEqual(table[0][9:12], ["1,500", "2.0", "`python train.py / tee log`"])
            self.assertRegex(table[2][5], r"^\+0.0 \[\+0.0, \+0.0\]$")
            with open(os.path.join(d, "out", "compare.csv")) as f:
                self.assertEqual(len(f.read().strip().split("\n")), 5)     # a header, and a name that holds a line end

    def test_curves_are_means_over_seeds(self):
        """A run's curve is of the same tasks from end to end; the drawing has the mean of the seeds at every step."""
        with tempfile.TemporaryDirectory() as d:
            for seed, run in enumerate(("a", "b"), 1):
                made_up_run(os.path.join(d, run), seed, 0.4 + 0.2 * seed, name="full")
            records = [evaluation.read_record(os.path.join(d, run)) for run in ("a", "b")]
            counts = made_up_measure(0.4)["counts"]["deduction"]
            first = np.mean([np.mean(counts[str(n)]["greedy"][:evaluation.SMALL]) for n in evaluation.MEAN_DEPTHS])
            for r in records:
                self.assertEqual([x for x, _ in r["curve"]["greedy"]["deduction"]], [0, 3])
                self.assertAlmostEqual(r["curve"]["greedy"]["deduction"][0][1], first, places=4)
            svg = evaluation.curves_svg(records)
            xml.etree.ElementTree.fromstring(svg)
            ends = [sum(r["curve"]["pass@1"]["induction"][i][1] for r in records) / 2 for i in (0, 1)]
            y = [evaluation.LOW - (evaluation.LOW - evaluation.TOP) * v for v in ends]
            self.assertRegex(svg, rf'class="line c2 d2" d="M[0-9.]+ {y[0]:.1f}L[0-9.]+ {y[1]:.1f}"')

    def test_rows_are_paired_by_seed(self):
        """A row's distance to full is taken seed by seed, in any order of runs; another start network has a table of
        its own, led by the row whose proposer learns."""
        runs = [{"named": True, "name": name, "setting": {"name": name}, "seed": str(seed), "command": "",
                 "start": 0.3, "rollouts": 1, "minutes": 1.0,
                 **{m: 0.5 for m in ("greedy", "pass@1", "pass@16", "pass@1 deep")},
                 **{f"{what} {m}{k}": g if what == "gain" else None for what in ("gain", "ci")
                    for m in evaluation.METRICS for k in ("", " deep", *(" " + k for k in KINDS))}}
                for name, seed, g in (("other", 3, 0.12), ("full", 1, 0.1), ("other", 1, 0.05), ("full", 2, 0.9),
                                      ("full", 3, 0.2))]
        runs += [{**runs[1], "name": name, "seed": str(seed), "gain pass@1": g,
                  "setting": {"name": name, "hasty": 0.0, "proposer": proposer}}
                 for name, seed, g, proposer in (("stiff", 1, 0.3, "frozen"), ("free", 1, 0.1, "train"),
                                                 ("stiff", 2, 0.3, "frozen"), ("free", 2, 0.1, "train"))]
        (full, other), (free, stiff) = evaluation.group_runs(runs)
        self.assertEqual([r["name"] for r in (full, other, free, stiff)], ["full", "other", "free", "stiff"])
        self.assertAlmostEqual(other["over pass@1"], ((0.05 - 0.1) + (0.12 - 0.2)) / 2)
        self.assertEqual([r["seed"] for r in other["runs"]], ["3", "1"])
        self.assertAlmostEqual(stiff["over pass@1"], 0.2)
        runs[0]["start"] = 0.4                     # made on another machine, say: no pair of full's run of that seed
        [_, other], _ = evaluation.group_runs(runs)
        self.assertAlmostEqual(other["over pass@1"], 0.05 - 0.1)

    def test_records_stand_for_runs(self):
        """The small records that --keep leaves give the same table, CSV and drawing as the runs they came from."""
        with tempfile.TemporaryDirectory() as d:
            runs = [os.path.join(d, name) for name in ("a1", "a2", "b1")]
            for seed, run in enumerate(runs, 1):
                made_up_run(run, seed, 0.3 + 0.1 * seed, name="full" if seed < 3 else "other", lr=0.1 * (seed > 2))
            texts = []
            for what in (runs, [os.path.join(d, "kept", f"{name}.json") for name in ("a1", "a2", "b1")]):
                code, out, _ = call_eval("--compare", *what, "--out", os.path.join(d, "out"),
                                         *(["--keep", os.path.join(d, "kept")] if what is runs else []))
                self.assertEqual(code, 0)
                texts.append([pathlib.Path(d, "out", name).read_text() for name in COMPARE_FILES])
            self.assertEqual(*texts)
            kept = pathlib.Path(d, "kept", "a1.json")
            self.assertLess(kept.stat().st_size, 20_000)
            before, other = kept.read_bytes(), os.path.join(d, "elsewhere", "a1")
            os.mkdir(os.path.dirname(other))
            made_up_run(other, 7, 0.5)
            for what, keep in ([runs[2], other], "kept"), ([kept, other], "new"):
                kept.with_name("b1.json").unlink(missing_ok=True)
                code, _, err = call_eval("--compare", *what, "--out", d, "--keep", os.path.join(d, keep))
                self.assertEqual((code, err.count("\n")), (2, 1), "a record would take another's place")
            self.assertEqual(kept.read_bytes(), before)
            self.assertFalse(kept.with_name("b1.json").exists(), "nothing is written if not all can be")

    def test_fewer_samples(self):
        """Runs of fewer than 16 samples have no pass@16, and a table all the same: - where it would stand."""
        with tempfile.TemporaryDirectory() as d:
            runs = [os.path.join(d, f"{name}{seed}") for name in "ab" for seed in (1, 2)]
            for i, run in enumerate(runs):
                made_up_run(run, i % 2, 0.5, name=run[-2])
                result = json.loads(pathlib.Path(run, "eval.json").read_text())
                for end in ("base", "final"):
                    for cells in result[end].values():
                        for cell in cells.values():
                            del cell["pass@16"]
                pathlib.Path(run, "eval.json").write_text(json.dumps(result))
            for some, seeds in (runs[:1], 1), (runs, 2):
                code, out, _ = call_eval("--compare", *some, "--out", os.path.join(d, "out"))
                self.assertEqual(code, 0)
                self.assertRegex(out, rf"\| a \| {seeds} \|.*\| - \|")

    def test_nothing_to_compare(self):
        """No finished run: exit code 2, and nothing is written."""
        with tempfile.TemporaryDirectory() as d:
            code, out, err = call_eval("--compare", d, "--out", os.path.join(d, "out"))
            self.assertEqual((code, len(err.strip().split("\n")) <= 2), (2, True))
            self.assertFalse(os.path.exists(os.path.join(d, "out")))


class Tags(HTMLParser):
    """Collects what a browser would make of a page."""
    def __init__(self, text):
        super().__init__()
        self.tags, self.attrs, self.words = set(), set(), ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attrs.update(a for a, _ in attrs)

    def handle_data(self, data):
        self.words += data


class TestReport(unittest.TestCase):
    EVIL = "</script></pre><img src=x onerror=alert(1)><script>alert(2)</script>\"'&\x00\u202e\ud800"

    def setUp(self):
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.folder = os.path.join(scratch.name, "run")

    def write(self, name, text):
        os.makedirs(self.folder, exist_ok=True)
        with open(os.path.join(self.folder, name), "w") as f:
            f.write(text)

    def page(self):
        with open(evaluation.report(self.folder), encoding="utf-8") as f:
            return f.read()

    def test_model_text_stays_text(self):
        """Markup in every text a model or a stranger may have written is shown, never obeyed; nothing is fetched."""
        e = self.EVIL
        made_up_run(self.folder, 1, 0.6, command=e, **{"key" + e: e})
        task = {"kind": e, "program": e, "inputs": [e], "outputs": [e], "message": e, "rate": 0.5,
                "tries": [{"reply": e, "answer": e, "verdict": e}]}
        self.write("metrics.jsonl", json.dumps({"phase": "selfplay", "step": 1, "tasks": [task]}) + "\n")
        page = self.page()
        tags = Tags(page)
        self.assertFalse(tags.tags & {"script", "img", "iframe", "link", "object", "embed", "base", "form"}, tags.tags)
        self.assertFalse({a for a in tags.attrs if a.startswith("on") or a in ("href", "src")})
        self.assertGreaterEqual(tags.words.count("<img src=x onerror=alert(1)>"), 8)
        self.assertNotIn("url(", page)
        self.assertNotIn("http", page.replace("http-equiv", ""))

    def test_torn_and_missing_files(self):
        """A torn last line, no eval.json, no steps at all: a page all the same; nothing of a run: exit code 2."""
        made_up_run(self.folder, 1, 0.6)
        with open(os.path.join(self.folder, "metrics.jsonl"), "a") as f:
            f.write('{"phase": "selfplay", "step": 9, "rollouts": 77')
        page = self.page()
        self.assertIn('<div class="big">1,000</div>rollouts', page)
        with open(os.path.join(self.folder, "metrics.jsonl"), "a") as f:
            f.write('\n{"phase": "selfplay", "step": 9, "kl": Infinity, "grad_norm": NaN}\n')
        self.assertIn("</html>", self.page())
        self.assertNotIn("not recorded", page.split("Before and after")[1].split("Rewards of")[0])
        os.remove(os.path.join(self.folder, "eval.json"))
        self.assertIn("not recorded", self.page())
        os.remove(os.path.join(self.folder, "metrics.jsonl"))
        self.assertIn("Settings", self.page())
        os.remove(os.path.join(self.folder, "config.json"))
        self.assertEqual(call_eval("--report", self.folder)[0], 2)

    def test_all_sections_show_what_was_logged(self):
        """With every key that a chart reads, no chart says 'not recorded', and each kind is drawn."""
        made_up_run(self.folder, 1, 0.6)
        kinds = {k: 0.5 for k in KINDS}
        cells = {f"{role}/{k}": 0.5 for role in ("propose", "solve") for k in KINDS}
        lines = [{"phase": "warmup", "step": 5, "loss": 1.5, "seconds": 1, "tokens_per_s": 9}]
        lines += [{"phase": "selfplay", "step": s, "minutes": s, "solve": kinds, "reward": cells, "length": cells,
                   "valid": kinds, "novel": kinds, "learnable": kinds, "rates": {k: [1, 2, 3] for k in KINDS},
                   "overclaim": kinds, "lines": kinds, "nodes": kinds, "cyclomatic": kinds, "distance": kinds,
                   "diversity": {"programs": 1, "answers": 3.0}, "entropy": 0.4, "kl": 1e-4, "mismatch": 1e-6,
                   "grad_norm": 1, "with_gradient": 8, "rollouts": 9, "memory_mb": 100, "tokens_per_s": 5e4,
                   "seconds": {k: 1 for k in ("sample", "execute", "learn")}, "eval": {k: {
                       "greedy": 0.4, "pass@1": 0.3} for k in KINDS}} for s in range(300)]
        self.write("metrics.jsonl", "\n".join(map(json.dumps, lines)))
        page = self.page()
        self.assertNotIn("not recorded", page)
        self.assertEqual(page.count("<svg"), 34)
        self.assertLess(len(page), 600_000)

    def test_tasks_of_every_kind_are_shown(self):
        """However many steps and kinds were logged, the report shows at most 4 steps, with the tasks of all kinds."""
        for kinds in KINDS, KINDS[:2], KINDS[:1]:
            for steps in range(1, 20):
                tasks = [{"kind": f"the {k}", "program": "", "inputs": ["1"], "outputs": ["1"], "rate": 0.5,
                          "tries": []} for k in kinds]
                self.write("metrics.jsonl", "\n".join(json.dumps({"step": s, "tasks": tasks}) for s in range(steps)))
                shown = [self.page().count(f"the {k}") for k in kinds]
                self.assertEqual(len(set(shown)), 1, shown)
                self.assertIn(shown[0], range(min(3, steps), 5), steps)

    def test_mutated_logs(self):
        """300 runs whose values are replaced by any JSON at all give a page (or exit code 2), never a traceback."""
        junk = [None, True, -1, 1e300, 10 ** 400, float("nan"), float("inf"), 1e-320, "x", "\ud800", [], {}, [[]],
                {"a": [1]}, [None, 1], 1e14, 5]
        made_up_run(self.folder, 1, 0.6, name="x")
        task = {"kind": "deduction", "program": "p", "inputs": ["1"], "outputs": ["2"], "rate": 0.5, "tries": [
            {"reply": "r", "answer": "a", "verdict": "right"}]}
        step = {"phase": "selfplay", "step": 1, "solve": {k: 0.5 for k in KINDS}, "rates": {k: [1, 2] for k in KINDS},
                "reward": {"solve/deduction": 1.0}, "tasks": [task], "seconds": {"learn": 1.0}, "tokens_per_s": 5,
                "rollouts": 3, "minutes": 1, "eval": {"deduction": {"greedy": 0.5}}}
        small = evaluation.join(made_up_measure(0.4, 3), made_up_measure(0.6, 3))
        record = evaluation.read_record(self.folder)
        for i in range(300):
            rng = random.Random(i)
            parts = json.loads(json.dumps([CONFIG, small, [step] * 3, record]))
            for part in parts:
                spots = []
                stack = [part]
                while stack:
                    x = stack.pop()
                    for key, v in (x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ()):
                        spots.append((x, key))
                        stack.append(v)
                for x, key in rng.sample(spots, rng.randint(0, 6)):
                    x[key] = rng.choice(junk)
            for name, part in zip(("config.json", "eval.json"), parts):
                self.write(name, json.dumps(part) if rng.random() > 0.05 else "{")
            self.write("metrics.jsonl", "\n".join(map(json.dumps, parts[2])))
            self.write("record.json", json.dumps(parts[3]))
            self.assertIn(call_eval(*(["--report", self.folder] if i % 4 else [
                "--compare", self.folder, f"{self.folder}/record.json", "--out", self.folder]))[0], (0, 2))


class TestReadme(unittest.TestCase):
    def test_results_are_the_records(self):
        """The READMEs' tables of results, and the tables, CSVs and drawings under results/, are what --compare makes of
        the records kept there."""
        readme = "".join(pathlib.Path(HERE, p).read_text(encoding="utf-8") for p in ("README.md", "results/README.md"))
        main = [str(pathlib.Path(HERE, "results", "main", f"full-s{seed}.json")) for seed in (1, 2, 3)]
        for folder in ("grid", "plain", "timid"):
            records = sorted(str(p) for p in pathlib.Path(HERE, "results", folder).glob("*-s[0-9].json"))
            with tempfile.TemporaryDirectory() as d:
                self.assertEqual(call_eval("--compare", *main * (folder == "grid"), *records, "--out", d)[0], 0)
                for name in os.listdir(d):
                    made = pathlib.Path(d, name).read_text(encoding="utf-8")
                    self.assertEqual(pathlib.Path(HERE, "results", folder, name).read_text(encoding="utf-8"), made)
        for folder in ("grid", "plain"):
            table = pathlib.Path(HERE, "results", folder, "compare.md").read_text(encoding="utf-8")
            table = table.partition("Percent right")[0].strip()            # the README leaves out the last columns
            self.assertIn(re.sub(r"^((\|[^|]*){9}\|).*$", r"\1", table, flags=re.M), readme)
        tables = evaluation.group_runs(evaluation.read_runs(main))         # and the table by seed
        self.assertEqual((tables[0][0]["name"], tables[0][0]["seeds"]), ("full", 3))
        for run in tables[0][0]["runs"]:
            for m in ("pass@1", "greedy"):
                end, rise = 100 * run[m], 100 * run["gain " + m]
                self.assertIn(f"{end - rise:.1f} -> {end:.1f} | **{rise:+.1f}**", readme)

    def test_its_commands_parse(self):
        """Every flag in the README is one of train.py's or eval.py's, and with its value train.py takes it."""
        with open(os.path.join(HERE, "README.md"), encoding="utf-8") as f:
            spans = re.findall(r"`(?:python train\.py )?(--[^`]*)`|^python train\.py (--.*?)(?: #|$)", f.read(), re.M)
        known, count = {f"--{name}" for name in [*asdict(train.Config()), "preset", "ablation", "seeds", "out"]}, 0
        for words in (re.sub(r"\b(NAME|S)\b", lambda m: {"NAME": "full", "S": "1"}[m[0]], a or b).split()
                      for a, b in spans):
            if words[0] in ("--compare", "--bench", "--report", "--keep", "--resume"):
                continue
            with self.subTest(" ".join(words)):
                self.assertLessEqual({w for w in words if w[:2] == "--"}, known)
                of_a_diff = {"frontier", "role", "deduction,abduction,induction,typing"} & {*words}
                if len(words) % 2 == 0 and not of_a_diff:
                    train.parse([*words, "--device", "cpu"])
                    count += 1
        self.assertGreater(count, 20)

    def test_its_scripts_run(self):
        """The scripts behind two results measure a run's folder: three kinds with four figures each; the checks."""
        with tempfile.TemporaryDirectory() as run, unittest.mock.patch.object(sys, "argv", ["", run]):
            save_run(run)
            line = r"\w+ .{13} \d+\.\d  candidates [\d.]+  wrong ones marked right [\d.]+\n"
            for name, shown in (("parts", rf"({line}){{12}}"),
                                ("checks", r"((before|after): of first candidates(.*\n){4}){2}")):
                with contextlib.redirect_stdout(io.StringIO()) as said:
                    runpy.run_path(os.path.join(HERE, "results", f"{name}.py"))
                self.assertRegex(said.getvalue(), rf"\A{shown}\Z")

    def test_its_diffs_work(self):
        """Each diff the README shows applies to the code as it is, and what it adds runs."""
        with open(os.path.join(HERE, "README.md"), encoding="utf-8") as f:
            diffs = [part.split("```")[0] for part in f.read().split("```diff\n")[1:]]
        checks = [  # what must hold once the diff of this number is in
            "import selfplay as s, train; assert s.propose_reward('valid', .125, 'frontier') == 1\n"
            "assert s.propose_reward('valid', .5, 'frontier') == 0\n"
            "assert train.parse(['--device', 'cpu', '--proposer_reward', 'frontier'])",
            "import trr, train; c = [('solve', 'a'), ('solve', 'b'), ('propose', 'a'), ('propose', 'b')]\n"
            "assert trr.advantages([1, 0, 2, 2], c, mode='role').sign().tolist() == [1, -1, 0, 0]\n"
            "assert train.parse(['--device', 'cpu', '--advantage', 'role'])",
            "import selfplay, train; assert (' first', 'str', 'x[:2]') in selfplay.OPS['str']\n"
            f"assert train.base_key(train.parse(['--device', 'cpu'])[0]) != "
            f"'{train.base_key(train.parse(['--device', 'cpu'])[0])}'",
            "import json, train; train.main('--preset smoke --warmup_steps 9 --seed_tasks 1 --steps 1 --samples 1 '\n"
            "    '--kinds deduction,typing --out r'.split())\n"
            "row = json.loads(open('r/metrics.jsonl').readlines()[-1]); assert row['valid']['typing'] >= 0\n"
            "assert json.load(open('r/eval.json'))['final']['typing']['3']['n'] == 6\n"
            "import executor, random, selfplay as s\nwith executor.Executor(workers=1) as ex:\n"
            "    (d,), _ = s.draw_programs(ex, random.Random(1), [2])\n"
            "    (t, _), = s.make_tasks(ex, [('typing', d.program, d.inputs, '')])\n"
            "    assert s.judge_answers(ex, [t], [s.parse_answer(s.gold(d, t, True)[1])]) == ['right']"]
        self.assertEqual(len(diffs), len(checks))

        def work(diff, check):
            self.assertLessEqual(sum(line[0] in "+-" for line in diff.strip().split("\n") if line[:3] != "---"), 15)
            with tempfile.TemporaryDirectory() as tmp:
                for name in ("eval", "executor", "model", "selfplay", "train", "trr"):
                    shutil.copy(os.path.join(HERE, f"{name}.py"), tmp)
                for part in diff.split("--- ")[1:]:
                    name, *lines = part.rstrip("\n").split("\n")
                    path = os.path.join(tmp, name)
                    with open(path, encoding="utf-8") as f:
                        text = f.read()
                    text = patch(self, text, lines)
                    with open(path, "w", encoding="utf-8") as f:
                        f.write(text)
                done = subprocess.run([sys.executable, "-c", check], cwd=tmp, capture_output=True, text=True)
                self.assertEqual(done.returncode, 0, done.stderr)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(work, diffs, checks))


def patch(test, text, lines):
    """text with the hunks of a diff applied; a hunk ends where an added line is followed by another kind."""
    old, new, hunks = [], [], []
    for line, after in zip(lines, lines[1:] + ["-"]):
        old += [line[1:]] if line[0] in " -" else []
        new += [line[1:]] if line[0] in " +" else []
        if line[0] == "+" and after[0] != "+":
            hunks.append(("\n".join(old), "\n".join(new)))
            old, new = [], []
    for before, after in hunks:
        test.assertEqual(text.count(before), 1, before)
        text = text.replace(before, after)
    return text


class TestCommandLine(unittest.TestCase):
    def test_bad_arguments(self):
        """Unknown flags, two things at once, nothing, a missing folder, no CUDA: one line, exit code 2."""
        with tempfile.TemporaryDirectory() as d:
            cases = [["--nope"], [], [d], [d, "--report", d], ["--tasks", "x"], [d, "--tasks"], ["--report", d],
                     ["--rep", d], [d, "--device", "tpu"]]
            wrong = [[d, "--keep", d], [d, "--out", d], ["--report", d, "--write"], ["--compare", d, "--tasks", "x"],
                     ["--bench", "--device", "cpu"], [d, "--tasks", "x", "--write"]]
            cases += wrong
            if not torch.cuda.is_available():
                save_run(d)
                cases = [c for c in cases if c != [d]] + [[d, "--device", "cuda"]]
                cases.remove(["--report", d])
            for argv in cases:
                code, out, err = call_eval(*argv)
                self.assertEqual((code, out, err.count("\n")), (2, "", 1), argv)
                self.assertEqual("goes with" in err, argv in wrong, argv)

    @only_one_of_the_people
    def test_a_run_is_measured_and_not_overwritten(self):
        """RUN prints the table and writes eval.json if absent, else only with --write; the same figures each time."""
        with tempfile.TemporaryDirectory() as d:
            save_run(d)
            path = os.path.join(d, "eval.json")
            code, out, _ = call_eval(d)
            self.assertEqual(code, 0)
            self.assertIn("all        1-5", out)
            with open(path) as f:
                first = json.load(f)
            for k in KINDS:
                self.assertEqual(set(first["base"][k]), set("123456"))
                self.assertTrue({"greedy", "pass@1", "n", "greedy_ci", "pass@1_ci"} <= set(first["final"][k]["3"]))
                self.assertIn("base", first["people"][k])
            with open(path, "w") as f:
                f.write("{}")
            code, out, _ = call_eval(d)
            self.assertEqual(code, 0)
            self.assertIn("--write replaces it", out)
            self.assertEqual(os.path.getsize(path), 2)
            self.assertEqual(call_eval(d, "--write")[0], 0)
            with open(path) as f:
                self.assertEqual(json.load(f), first)
            self.assertEqual(sorted(os.listdir(d)), ["ckpt.pt", "config.json", "eval.json"])
            os.remove(path)
            save_run(d, step=2)
            self.assertIn("at step 2 of 3", call_eval(d)[1])
            self.assertFalse(os.path.exists(path), "an eval.json would tell a grid that the run is finished")

    @only_one_of_the_people
    def test_a_run_is_measured_as_it_was_trained(self):
        """In the number type of its config.json, but in float32 where bfloat16 would be emulated."""
        used, real = set(), evaluation.generate

        def note(*args, dtype, **more):
            used.add(dtype)
            return real(*args, **more)
        for wanted, there, expected in (("bfloat16", True, "bfloat16"), ("bfloat16", False, "float32"),
                                        ("float32", True, "float32"), (["bfloat16"], True, "float32")):
            with tempfile.TemporaryDirectory() as d, unittest.mock.patch.object(evaluation, "generate", note), \
                    unittest.mock.patch.object(network, "has_bfloat16", lambda device: there):
                used.clear()
                save_run(d, {**CONFIG, "dtype": wanted, "suite_n": 1, "samples": 1})
                self.assertEqual((call_eval(d)[0], used), (0, {expected}))

    def test_exit_code_of_the_process(self):
        """The exit code and the one line hold for the real process too."""
        first = subprocess.Popen([sys.executable, evaluation.__file__, "/nonexistent"], stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE, text=True)
        with tempfile.TemporaryDirectory() as d:
            made_up_run(os.path.join(d, "r"), 1, 0.5)
            done = subprocess.run(f"'{sys.executable}' '{evaluation.__file__}' --compare '{d}/r' --out '{d}' | true",
                                  shell=True, stderr=subprocess.PIPE, text=True)
        out, err = first.communicate()
        self.assertEqual((first.returncode, out, err.count("\n")), (2, "", 1))
        self.assertEqual(done.stderr, "")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        unittest.main()
    # Everything: in two processes, for most of the slow tests wait for processes of their own
    slow = ["TestTrain", "TestReadme", "TestCommandLine"]
    quick = [name for name, value in globals().items() if isinstance(value, type)
             and issubclass(value, unittest.TestCase) and name not in slow]
    with tempfile.TemporaryFile("w+") as said:
        other = subprocess.Popen([sys.executable, __file__, *quick], stdout=said, stderr=said)
        done = unittest.main(defaultTest=slow, exit=False)
        failed = other.wait() or not done.result.wasSuccessful()
        said.seek(0)
        print(said.read(), file=sys.stderr)
    sys.exit(failed)
