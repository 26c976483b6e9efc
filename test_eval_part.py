"""Tests of eval.py, to be merged into test_azr.py. Run: python test_eval_part.py"""
import contextlib
import copy
import io
import itertools
import json
import os
import pickle
import random
import subprocess
import sys
import tempfile
import time
import unittest
from dataclasses import asdict
from html.parser import HTMLParser

import numpy as np
import torch

import eval as evaluation
from executor import Executor
from model import GPT, GPTConfig
from selfplay import KINDS

CONFIG = {"seed": 1, "n_inputs": 6, "large": False, "max_new": 24, "suite_n": 3, "samples": 4, "block_size": 320}


def tiny_gpt(seed=0, **more):
    torch.manual_seed(seed)
    return GPT(GPTConfig(n_layer=1, n_embd=32, n_head=2, n_kv_head=1, **more))


def save_run(folder, config=None, **changes):
    """A run's folder as train.py leaves it, with a tiny untrained model."""
    model = tiny_gpt()
    data = {"version": 1, "config": CONFIG, "gpt": asdict(model.config), "model": model.state_dict(),
            "base": tiny_gpt(1).state_dict(), "step": 3, **changes}
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(CONFIG if config is None else config, f)
    torch.save(data, os.path.join(folder, "ckpt.pt"))
    return model


def call(*argv):
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
        self.assertAlmostEqual(high - low, 2 * 1.96 * x.std() / 20, delta=0.012)
        wide = evaluation.interval([x[:50]])
        self.assertGreater(wide[1] - wide[0], 2 * (high - low))
        self.assertEqual(evaluation.interval([np.ones(9)]), [1, 1])

    def test_interval_covers_95_in_100(self):
        """Of 200 samples of 100 coin tosses about 95 % have an interval that holds the truth."""
        rng = np.random.default_rng(1)
        ends = [evaluation.interval([rng.random(100) < 0.6], draws=500) for _ in range(200)]
        self.assertAlmostEqual(np.mean([low <= 0.6 <= high for low, high in ends]), 0.95, delta=0.05)

    def test_pairing_cancels_what_the_tasks_differ_in(self):
        """A gain of one more right sample on every task has an interval of width 0, however the tasks differ."""
        base = made_up_measure(0.4)
        final = copy.deepcopy(base)
        for k in KINDS:
            for d in base["table"][k]:
                c = final["counts"][k][d]
                c["right"] = [r + 1 for r in c["right"]]
                final["table"][k][d]["pass@1"] += 1 / 16
        both = {"base": base["counts"], "final": final["counts"]}
        rise, ci = evaluation.gain(base["table"], final["table"], "pass@1", both)
        self.assertAlmostEqual(rise, 1 / 16)
        self.assertEqual(ci, [0.0625, 0.0625])
        self.assertIsNone(evaluation.gain(base["table"], final["table"], "pass@1")[1])

    def test_table_fits_80_columns(self):
        """The table fits a terminal, with every figure at its widest, and with a base, people or counts missing."""
        a, b = made_up_measure(0.0), made_up_measure(1.0)
        joined = evaluation.join(a, b)
        for lines in (evaluation.table_lines(joined["base"], joined["final"], joined["counts"], joined["people"]),
                      evaluation.table_lines(None, b["table"]), evaluation.table_lines({}, {}, {}, {})):
            self.assertLessEqual(max(map(len, lines)), 80)
            self.assertGreater(len(lines), 20)


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
        real, model, counts = evaluation.generate, tiny_gpt(), {}

        def oracle(model, wanted, max_new, temperature, tries, seed):
            answer = [evaluation.encode(prompts[tuple(p)].outputs[0]) if temperature else [1] for p in wanted]
            return [[ANSWER, *a, END] for a in answer for _ in range(tries)], None
        from model import END
        from selfplay import ANSWER
        evaluation.generate, evaluation.encode = oracle, __import__("model").encode
        try:
            cell = evaluation.evaluate(model, self.ex, suite, 24, 4, counts=counts)["deduction"]["1"]
        finally:
            evaluation.generate = real
            del evaluation.encode
        self.assertEqual((cell["greedy"], cell["pass@1"], cell["pass@4"], cell["n"]), (0, 1, 1, 4))
        self.assertEqual(counts["deduction"]["1"], {"greedy": [0] * 4, "right": [4] * 4, "samples": 4})

    def test_prompts_without_room_count_as_wrong(self):
        """A task whose prompt leaves no room for a reply is not dropped: it is wrong, and counted."""
        tasks = evaluation.build_suite(self.ex, 3, 6)["deduction", 6]
        cell = evaluation.evaluate(tiny_gpt(block_size=32), self.ex, {("deduction", 6): tasks}, 24, 4)["deduction"]["6"]
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
        lines = [good, b"", b"not json", b"[1, 2]", line(1, "1", "1"), b'{"code": "def f(x): return x"}', b"\xff\xfe\x00",
                 line("def f(x): return x", "1", "2"), line("def f(x) return x", "1", "1"),
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

    def test_random_bytes(self):
        """2,000 lines of mutated JSON and noise raise nothing and are all named or run."""
        rng = random.Random(0)
        row = b'{"code": "def f(x):\\n    return x", "input": "1", "output": "1", "id": "a"}'
        lines = []
        for _ in range(2000):
            text = bytearray(row)
            for _ in range(rng.randint(1, 4)):
                text[rng.randrange(len(text))] = rng.choice(b'"{}[]\\:,0x \t\x00\xff\xc3')
            lines.append(bytes(text))
        tasks, bad, err = self.read(b"\n".join(lines))
        self.assertEqual(len(tasks) // 2 + bad, 2000)
        self.assertEqual(len(err.strip().split("\n")), bad)

    def test_from_the_command_line(self):
        """A file with one good line exits 0 and prints both kinds; an empty, missing or hopeless file exits 2 in one line."""
        with tempfile.TemporaryDirectory() as d:
            save_run(d)
            file = os.path.join(d, "t.jsonl")
            with open(file, "w") as f:
                f.write('x\n{"code": "def f(x):\\n    return x", "input": "1", "output": "1", "id": 1}\n')
            code, out, err = call(d, "--tasks", file)
            self.assertEqual(code, 0)
            self.assertIn("1 tasks, 1 lines skipped", out)
            self.assertTrue("deduction" in out and "abduction" in out and "line 1" in err)
            for text in ("", "\n", "nothing\n"):
                with open(file, "w") as f:
                    f.write(text)
                code, out, err = call(d, "--tasks", file)
                self.assertEqual((code, out), (2, ""))
                self.assertTrue(err.split("\n")[-2].startswith("eval.py: "))
            self.assertEqual(call(d, "--tasks", file + ".none")[0], 2)


class TestLoading(unittest.TestCase):
    def setUp(self):
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.folder, self.file = scratch.name, os.path.join(scratch.name, "ckpt.pt")

    def refused(self):
        err = io.StringIO()
        with contextlib.redirect_stderr(err), self.assertRaises(SystemExit) as caught:
            evaluation.load_run(self.folder)
        self.assertEqual(caught.exception.code, 2)
        self.assertEqual(err.getvalue().count("\n"), 1)
        self.assertTrue(err.getvalue().startswith("eval.py: "))
        return err.getvalue()

    def test_a_whole_one_loads(self):
        """What was saved is what is loaded, with and without a start model."""
        model = save_run(self.folder)
        config, loaded, base = evaluation.load_run(self.folder)
        self.assertEqual(config, CONFIG)
        self.assertTrue(all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters())))
        self.assertFalse(torch.equal(base.head.weight, loaded.head.weight))
        save_run(self.folder, base=None)
        self.assertIsNone(evaluation.load_run(self.folder)[2])

    def test_truncated_and_flipped(self):
        """A cut file is refused; a flipped byte is refused or touched no weight (torch alone would load wrong weights)."""
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
        class Bomb:
            def __reduce__(self):
                return os.mkdir, (os.path.join(tempfile.gettempdir(), "azr-bomb"),)
        save_run(self.folder)
        for data in (pickle.dumps(Bomb()), b"hello", b"PK\x03\x04" + b"\0" * 100):
            with open(self.file, "wb") as f:
                f.write(data)
            self.refused()
        state = tiny_gpt().state_dict()
        gpt = asdict(tiny_gpt().config)
        name = "blocks.0.qkv.weight"
        for change in ({"version": 2}, {"model": None}, {"model": {}}, {"gpt": None}, {"gpt": {}}, {"gpt": [1]},
                       {"gpt": {**gpt, "n_layer": 10 ** 9}}, {"gpt": {**gpt, "n_layer": 60_000}},
                       {"gpt": {**gpt, "n_embd": 65536}}, {"gpt": {**gpt, "n_head": 0}}, {"gpt": {**gpt, "n_kv_head": 3}},
                       {"gpt": {**gpt, "rope_theta": float("nan")}}, {"gpt": {**gpt, "vocab_size": 7}},
                       {"gpt": {**gpt, "qk_norm": 1}}, {"model": {**state, name: state[name][:5]}},
                       {"model": {**state, name: state[name] * float("nan")}}, {"model": {**state, name: state[name].int()}},
                       {"model": {**state, name: "x"}}, {"model": {**state, "more": state[name]}}, {"base": {}},
                       {"model": {**state, name: torch.zeros(1).expand(state[name].shape)}}):
            save_run(self.folder, **change)
            self.refused()
        torch.save([1, 2], self.file)
        self.refused()
        torch.save({"version": 1, "model": Bomb()}, self.file)
        self.refused()
        self.assertFalse(os.path.exists(os.path.join(tempfile.gettempdir(), "azr-bomb")))

    def test_foreign_configs(self):
        """config.json: missing, torn, no object, a field missing, of another type or out of range."""
        save_run(self.folder)
        for text in ("", "{", "[]", "null", "[" * 100_000, json.dumps({**CONFIG, "seed": "1"}),
                     json.dumps({**CONFIG, "large": 1}), json.dumps({**CONFIG, "samples": 10 ** 30}),
                     json.dumps({**CONFIG, "n_inputs": 1}), json.dumps({k: v for k, v in CONFIG.items() if k != "max_new"})):
            with open(os.path.join(self.folder, "config.json"), "w") as f:
                f.write(text)
            self.refused()
        os.remove(os.path.join(self.folder, "config.json"))
        self.refused()
        save_run(self.folder)
        os.remove(self.file)
        self.assertIn("ckpt.pt", self.refused())


class TestCompare(unittest.TestCase):
    def test_groups_by_setting_and_pairs_by_seed(self):
        """Runs that differ in the seed alone share a row; its mean, spread and gain are those computed by hand."""
        with tempfile.TemporaryDirectory() as d:
            runs = [os.path.join(d, name) for name in ("a1", "a2", "b1", "c1")]
            made_up_run(runs[0], 1, 0.5, name="full", command="python train.py | tee log")
            made_up_run(runs[1], 2, 0.6, name="full")
            made_up_run(runs[2], 1, 0.7, name="full", lr=0.1)
            made_up_run(runs[3], 1, 0.4, name="<img onerror=x>|\n", lr=0.2)
            code, out, err = call("--compare", *runs, os.path.join(d, "none"), "--out", os.path.join(d, "out"))
            self.assertEqual(code, 0)
            self.assertIn("none: no finished run", err)
            table = [[c.strip() for c in line.replace("\\|", "/").split("|")[1:-1]] for line in out.split("\n")
                     if line.startswith("|")][2:]
            self.assertEqual([row[:2] for row in table], [["full (lr=None)", "2"], ["full (lr=0.1)", "1"],
                                                          ["<img onerror=x>/", "1"]])
            finals = [evaluation.mean_over(made_up_measure(s)["table"], "greedy") for s in (0.5, 0.6)]
            base = evaluation.mean_over(made_up_measure(0.4)["table"], "greedy")
            mean, std = 100 * np.mean(finals), 100 * np.std(finals, ddof=1)
            self.assertEqual(table[0][2], f"{mean:.1f} \u00b1 {std:.1f}")
            half = 12.71 * std / 2 ** 0.5                                  # Student's t with one degree of freedom
            self.assertEqual(table[0][3], f"{mean - 100 * base:+.1f} [{mean - 100 * base - half:+.1f}, "
                                          f"{mean - 100 * base + half:+.1f}]")
            self.assertEqual(table[0][6:8], ["1,500", "2.0"])
            self.assertEqual(table[0][8], "`python train.py / tee log`")
            self.assertRegex(table[2][3], r"^\+0.0 \[\+0.0, \+0.0\]$")
            with open(os.path.join(d, "out", "compare.csv")) as f:
                self.assertEqual(len(f.read().strip().split("\n")), 5)     # a header, and a name that holds a line end
            with open(os.path.join(d, "out", "compare.svg")) as f:
                svg = f.read()
            import xml.etree.ElementTree
            xml.etree.ElementTree.fromstring(svg)
            self.assertNotIn("<img", svg)

    def test_nothing_to_compare(self):
        """Folders without a finished run end in one line and exit code 2, and nothing is written."""
        with tempfile.TemporaryDirectory() as d:
            code, out, err = call("--compare", d, "--out", os.path.join(d, "out"))
            self.assertEqual(code, 2)
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
        """A torn last line, no eval.json, no steps at all: a page all the same; nothing of a run at all: exit code 2."""
        made_up_run(self.folder, 1, 0.6)
        with open(os.path.join(self.folder, "metrics.jsonl"), "a") as f:
            f.write('{"phase": "selfplay", "step": 9, "rollouts": 77')
        self.assertIn("3,000", self.page().replace("1,000", "3,000"))
        os.remove(os.path.join(self.folder, "eval.json"))
        self.assertIn("not recorded", self.page())
        os.remove(os.path.join(self.folder, "metrics.jsonl"))
        self.assertIn("Settings", self.page())
        os.remove(os.path.join(self.folder, "config.json"))
        self.assertEqual(call("--report", self.folder)[0], 2)

    def test_all_sections_show_what_was_logged(self):
        """With every key of metrics.jsonl at hand, no chart says 'not recorded', and each kind is drawn."""
        made_up_run(self.folder, 1, 0.6)
        kinds = {k: 0.5 for k in KINDS}
        cells = {f"{role}/{k}": 0.5 for role in ("propose", "solve") for k in KINDS}
        lines = [{"phase": "warmup", "step": 5, "loss": 1.5, "seconds": 1, "tokens_per_s": 9}]
        lines += [{"phase": "selfplay", "step": s, "minutes": s, "solve": kinds, "reward": cells, "length": cells,
                   "valid": kinds, "novel": kinds, "learnable": kinds, "rates": {k: [1, 2, 3] for k in KINDS},
                   "lines": kinds, "diversity": {"programs": 1, "answers": 3.0}, "entropy": 0.4, "kl": 1e-4,
                   "grad_norm": 1, "with_gradient": 8, "rollouts": 9, "memory_mb": 100, "tokens_per_s": 5e4,
                   "seconds": {k: 1 for k in ("propose", "solve", "execute", "learn")}, "eval": {k: {
                       "greedy": 0.4, "pass@1": 0.3} for k in KINDS}} for s in range(300)]
        self.write("metrics.jsonl", "\n".join(map(json.dumps, lines)))
        page = self.page()
        self.assertNotIn("not recorded", page)
        self.assertEqual(page.count("<svg"), 27)
        self.assertLess(len(page), 600_000)

    def test_mutated_logs(self):
        """300 runs with keys lost and values replaced by any JSON at all give a page (or exit code 2), never a traceback."""
        junk = [None, True, -1, 1e300, 10 ** 400, float("nan"), float("inf"), 1e-320, "x", "\ud800", [], {}, [[]],
                {"a": [1]}, [None, 1], 1e14, 5]
        made_up_run(self.folder, 1, 0.6, name="x")
        task = {"kind": "deduction", "program": "p", "inputs": ["1"], "outputs": ["2"], "rate": 0.5, "tries": [
            {"reply": "r", "answer": "a", "verdict": "right"}]}
        step = {"phase": "selfplay", "step": 1, "solve": {k: 0.5 for k in KINDS}, "rates": {k: [1, 2] for k in KINDS},
                "reward": {"solve/deduction": 1.0}, "tasks": [task], "seconds": {"learn": 1.0}, "tokens_per_s": 5,
                "rollouts": 3, "minutes": 1, "eval": {"deduction": {"greedy": 0.5}}}
        small = evaluation.join(made_up_measure(0.4, 3), made_up_measure(0.6, 3))
        for i in range(300):
            rng = random.Random(i)
            parts = [copy.deepcopy(CONFIG), copy.deepcopy(small), [copy.deepcopy(step) for _ in range(3)]]
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
            for argv in ([("--report", self.folder)] if i % 4 else [("--compare", self.folder, "--out", self.folder)]):
                self.assertIn(call(*argv)[0], (0, 2))


class TestCommandLine(unittest.TestCase):
    def test_bad_arguments(self):
        """Unknown flags, two things at once, nothing, a missing folder, no CUDA: one line, exit code 2."""
        with tempfile.TemporaryDirectory() as d:
            cases = [["--nope"], [], [d], [d, "--report", d], ["--tasks", "x"], [d, "--tasks"], ["--report", d],
                     ["--rep", d], [d, "--device", "tpu"]]
            if not torch.cuda.is_available():
                save_run(d)
                cases = [c for c in cases if c != [d]] + [[d, "--device", "cuda"]]
                cases.remove(["--report", d])
            for argv in cases:
                code, out, err = call(*argv)
                self.assertEqual((code, out, err.count("\n")), (2, "", 1), argv)

    def test_a_run_is_measured_and_not_overwritten(self):
        """RUN prints the table and writes eval.json when it is absent; later only with --write; the same figures each time."""
        with tempfile.TemporaryDirectory() as d:
            save_run(d)
            path = os.path.join(d, "eval.json")
            code, out, _ = call(d)
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
            self.assertEqual(call(d)[0], 0)
            self.assertEqual(os.path.getsize(path), 2)
            self.assertEqual(call(d, "--write")[0], 0)
            with open(path) as f:
                self.assertEqual(json.load(f), first)
            self.assertEqual(sorted(os.listdir(d)), ["ckpt.pt", "config.json", "eval.json"])

    def test_exit_code_of_the_process(self):
        """The exit code and the one line hold for the real process too."""
        done = subprocess.run([sys.executable, evaluation.__file__, "/nonexistent"], capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stdout, done.stderr.count("\n")), (2, "", 1))


if __name__ == "__main__":
    start = time.time()
    unittest.main(verbosity=1)
