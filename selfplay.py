"""
selfplay.py: the game of Absolute Zero (arXiv 2505.03335, sections 3.1-3.3): tasks, prompts, replies, verdicts, rewards.

One model proposes tasks and solves them; the executor is the only teacher. Three kinds of task over a program f:

    kind       given                               asked                      the proposer writes
    deduction  program, input                      the output                 program + input
    abduction  program, output                     an input that gives it     program + input
    induction  half of the pairs + a message       the program                N inputs + message, for a given program

A task is valid, and enters its buffer, when it parses, runs, is deterministic and has a new program (induction's is
given). It is tried n times; the share of right tries is its solve rate, and the proposer earns 1 - rate unless the rate
is 0 or 1 (Eq. 4): too easy and too hard both teach nothing.

Where we differ from the paper and from the authors' code:
1) Tasks are solved in the step that proposed them (Algorithm 1); the authors' loaders are built before proposing, so
   their solver trains on the tasks of the step before.
2) A buffer keeps its newest entries (the authors' truncation keeps the oldest and then freezes), and is seeded with
   tasks of its own (the paper: deduction and abduction with the same).
3) Novelty gate: a program that was proposed before, for whichever input and in either kind, is not valid, so that the
   proposer cannot live on one good task (the paper adds every valid triplet). Induction's proposer, who is given its
   program, passes no such gate.
4) Length gate (`fault`): else a proposer can make tasks hard by making them long; in an early prototype that
   habit leaked into induction, the solver's role that also writes programs, until it fell to zero. Outputs and prompts
   are bounded in any case.
5) Answers are compared by canonical keys made in a worker process; nothing a model wrote is ever evaluated in
   the trainer, and no expected output is ever sent to a worker, so an object with a friendly __eq__ wins nothing.
6) Induction: inputs must differ as text, or a hidden pair could be a shown one (literals are first spelt as repr does;
   the expression `0 + 1` still differs from `1`); hidden outputs must not be all the same, or a constant program would
   do; a message is words, not code (the paper: anything).
7) Demonstrated thoughts are execution traces: deduction runs the program line by line, abduction runs it backwards to
   an input and forwards to check it, induction writes it while running it. The paper's models think as they please.
8) Replies are split at role tokens, not by regular expressions: a reply has exactly one reading. Answers of deduction
   and abduction are literals; the authors' may be any expression.
9) An answer that is no literal, no input, no program or a forbidden one counts as unparsable, -1 (the authors' code:
   wrong, -0.5).
10) A proposer writes its task at once, without a thought; a held-out program (of depth 1: with its input) is not valid.
    Programs are compared as text: with a comment more, one is another.

Try:  python selfplay.py       # one prompt, reply, parse and reward for each of the six role x kind cells
"""
import ast
import math
import random
import re
import sys
from collections import deque
from dataclasses import dataclass

from executor import Executor, Unusable
from model import END, ID, KINDS, SPECIAL, decode, encode

OUTPUT_KINDS = ("deduction",)  # of KINDS: asked for an output, so the answer is data and nothing has to be run
PROGRAM, INPUT, OUTPUT, MESSAGE, THINK, TRY, RIGHT, WRONG, ANSWER = (
    ID[f"<|{name}|>"] for name in "program input output message think try right wrong answer".split())

MAX_VALUE = 20       # tokens of one input or output; bounds every prompt
MAX_PROGRAM = 56     # tokens of a program
MESSAGE_TEXT = re.compile(r"[a-z ]{0,60}")


@dataclass
class Task:
    """One task. deduction and abduction use one (input, output) pair, induction all N; `keys` are the canonical forms
    by which outputs are compared."""
    kind: str
    program: str
    inputs: list
    outputs: list
    keys: list
    message: str = ""
    depth: int = 0             # of the held-out suite's tasks; nobody knows it of a proposed one
    rate: float = -1.0         # its solve rate when it was last tried; -1: never


@dataclass
class Rollout:
    """One sampled reply and all that learning needs to know of it."""
    role: str
    kind: str
    prompt: list               # token ids
    reply: list                # token ids, END included when the reply ended by itself
    logp: list                 # of each reply token under the policy that sampled it
    task: Task = None          # solve: the task; propose: the task it became, or None
    group: int = -1            # tries of one task share a number (the per-task baseline)
    answer: str = None         # solve: the text after <|answer|>
    verdict: str = ""          # "right", "wrong", "valid", or why not
    reward: float = 0.0
    known: bool = False        # propose: its program is in train.Game.known, whether the novelty gate minds or not


# ---------------------------------------------------------------------------------------------------------------------
# Prompts: token ids, so that no text can imitate a role token


def solve_prompt(task):
    half = len(task.inputs) // 2
    ids = [ID[f"<|solve_{task.kind}|>"]]
    if task.kind == "induction":                     # half of the pairs is shown, the other half decides
        for i, o in zip(task.inputs[:half], task.outputs[:half]):
            ids += [INPUT, *encode(i), OUTPUT, *encode(o)]
        return ids + [MESSAGE, *encode(task.message), THINK]
    ids += [PROGRAM, *encode(task.program)]
    if task.kind in OUTPUT_KINDS:
        return ids + [INPUT, *encode(task.inputs[0]), THINK]
    return ids + [OUTPUT, *encode(task.outputs[0]), THINK]


def propose_prompt(kind, references):
    """references: K tasks of the buffer; for induction one task, whose program is to be described by N inputs."""
    ids = [ID[f"<|propose_{kind}|>"]]
    if kind == "induction":
        return ids + [PROGRAM, *encode(references[0].program), THINK]
    for r in references:
        ids += [PROGRAM, *encode(r.program), INPUT, *encode(r.inputs[0]), OUTPUT, *encode(r.outputs[0])]
    return ids + [THINK]


def sections(ids):
    """[(marker, text)] of a reply: what stands behind each role token. The text before the first has marker None."""
    parts, start, marker = [], 0, None
    for i, t in enumerate(ids):
        if t >= ID[SPECIAL[0]]:
            parts.append((marker, ids[start:i]))
            marker, start = t, i + 1
    return parts + [(marker, ids[start:])]


def parse_answer(reply):
    """Text of a solver's answer, or None: a reply must end, and hold exactly one <|answer|>, last."""
    if not reply or reply[-1] != END or reply.count(ANSWER) != 1:
        return None
    marker, ids = sections(reply[:-1])[-1]
    return decode(ids) if marker == ANSWER else None


def parse_proposal(kind, reply, n_inputs):
    """(program, inputs, message) of a proposer's reply, or None. For induction the program is None: it was given."""
    if not reply or reply[-1] != END:
        return None
    parts = sections(reply[:-1])
    wanted = [INPUT] * n_inputs + [MESSAGE] if kind == "induction" else [PROGRAM, INPUT]
    if [marker for marker, _ in parts] != [None, *wanted] or parts[0][1]:
        return None
    texts = [decode(ids) for _, ids in parts[1:]]
    return (None, texts[:-1], texts[-1]) if kind == "induction" else (texts[0], texts[1:], "")


# ---------------------------------------------------------------------------------------------------------------------
# Validity (paper section 3.3.3, Eq. 7): what may enter a buffer


def as_data(ex, inputs):
    """Each input as repr would write it; None where an argument is no literal. It is read as the list of its arguments,
    ("1, 'a'" as [1, 'a']); `1], [2` would be a tuple of two. The newline ends a comment, which else would hide
    the bracket."""
    written = ex.literals([f"[{i}\n]" for i in inputs])
    return [r.value[1:-1] if r.ok and r.value[0] == "[" else None for r in written]


def plain_inputs(ex, proposals):
    """Proposals as parse_proposal gives them, their inputs spelt alike, so that the gates below, which compare text,
    compare values: `1` and `1 ` are one input. What is no literal stays as it is."""
    plain = iter(as_data(ex, [i for p in proposals if p for i in p[1]]))
    return [p and (p[0], [i if (data := next(plain)) is None else data for i in p[1]], p[2]) for p in proposals]


def fault(kind, program, inputs, message, max_lines):
    """'' or why a proposal is refused before anything is run: the length gate (max_lines 0: off), two equal inputs (a
    hidden pair could be a shown one), or a message that is code."""
    if max_lines and (program.count("\n") - 1 > max_lines or len(encode(program)) > MAX_PROGRAM):
        return "long program"
    if max_lines and max(len(encode(i)) for i in inputs) > MAX_VALUE:
        return "long input"
    if kind == "induction" and len(set(inputs)) < len(inputs):
        return "same inputs"
    return "message" if kind == "induction" and not MESSAGE_TEXT.fullmatch(message) else ""


def hidden_agree(outputs):
    """Whether the hidden half of an induction task's outputs is one value: a constant program would be judged right."""
    return len(set(outputs[len(outputs) // 2:])) < 2


def make_tasks(ex, wanted, max_prompt=None, gate=True):
    """Run proposals into tasks. wanted: [(kind, program, inputs, message)]; returns [(Task or None, reason)] in order.

    Every program runs on every input twice or more, in processes with different hash seeds and address layouts (j = 2
    in Eq. 7); the first input that fails names the reason. A task whose solver prompt is longer than max_prompt tokens
    is refused. gate=False lets failures through with the output None, which deduction is then asked for."""
    jobs = [(program, i) for _, program, inputs, _ in wanted for i in inputs]
    results = iter(ex.run(jobs))
    made = []
    for kind, program, inputs, message in wanted:
        rs = [next(results) for _ in inputs]
        error = next((r.error for r in rs if not r.ok), "") if gate else ""
        if not error and max(len(encode(r.value)) for r in rs) > MAX_VALUE:
            error = "long output"
        task = Task(kind, program, list(inputs), [r.value if r.ok else "None" for r in rs],
                    [r.key if r.ok else "None" for r in rs], message)
        if not error and gate and kind == "induction" and hidden_agree(task.keys):
            error = "constant"
        if not error and max_prompt and len(solve_prompt(task)) > max_prompt:
            error = "long prompt"
        made.append((None, error) if error else (task, ""))
    return made


def judge_answers(ex, tasks, answers):
    """Verdicts for one answer each: 'right', 'wrong', or 'unparsable' (no answer, or not the kind of text asked for).

    deduction: the answer is a literal whose key equals the output's. abduction: ANY input that gives the output.
    induction: a program that gives the hidden half of the outputs, all of them (shown pairs may be memorised, so they
    do not count)."""
    asked = [(task, answer) for task, answer in zip(tasks, answers) if answer is not None]
    # 1) Which answers are data at all? No expressions: an output must be a literal, and so each argument of an input
    outputs = iter(ex.literals([answer for task, answer in asked if task.kind in OUTPUT_KINDS]))
    inputs = iter(as_data(ex, [answer for task, answer in asked if task.kind == "abduction"]))
    # 2) What is to be run, [(program, input)]: the task's program on an input; a program on the hidden half of inputs
    given, runs = [[] for _ in tasks], [[] for _ in tasks]     # given: [a Result], where the answer is itself an output
    for i, (task, answer) in enumerate(zip(tasks, answers)):
        if answer is None:
            continue
        if task.kind in OUTPUT_KINDS:
            given[i] = [next(outputs)]
        elif task.kind == "abduction":
            data = next(inputs)
            if data or data == task.inputs[0]:       # an empty one counts only where the program takes no argument
                runs[i] = [(task.program, answer)]
        else:
            runs[i] = [(answer, x) for x in task.inputs[len(task.inputs) // 2:]]
    # 3) Compare keys: of the answer itself, or of the runs
    results, verdicts = iter(ex.run([job for mine in runs for job in mine])), []
    for task, rs, mine in zip(tasks, given, runs):
        rs = rs or [next(results) for _ in mine]
        want = task.keys[len(task.inputs) // 2:] if task.kind == "induction" else task.keys
        if rs and all(r.ok and r.key == k for r, k in zip(rs, want, strict=True)):
            verdicts.append("right")
        # no literal, no input or no program at all is a format error, like a missing answer. But what abduction's
        # program says of an input, a syntax error of its own say, is its own affair
        elif not rs or task.kind != "abduction" and rs[0].error in ("syntax", "no_f", "forbidden"):
            verdicts.append("unparsable")
        else:
            verdicts.append("wrong")
    return verdicts


# ---------------------------------------------------------------------------------------------------------------------
# Rewards: the whole table (Eqs. 4-6)

SOLVE_REWARD = {"right": 1.0, "wrong": -0.5, "unparsable": -1.0}  # Eq. 6 with r_solve of Eq. 5


def propose_reward(verdict, rate, mode="learnability", zero=0.0):
    """Reward of a proposal: -1 unless it is valid (the text below Eq. 6: only what passes all filters counts as well
    formed), else by its solve rate.

    learnability: Eq. 4, 1 - rate inside (0, 1), `zero` at both ends (the authors' code gives -0.5 there, the paper 0).
    uncertainty:  2 min(rate, 1 - rate): most for a coin toss (R-Zero's form, rescaled to [0, 1]).
    valid: 1 for any valid task, so only the gates shape the proposer. none: 0 whatever happens."""
    if mode == "none":
        return 0.0
    if verdict != "valid":
        return -1.0
    if mode == "valid":
        return 1.0
    assert 0 <= rate <= 1, "a valid task that was never tried has no solve rate, and earns nothing"
    if rate in (0.0, 1.0):
        return zero
    return 1 - rate if mode == "learnability" else 2 * min(rate, 1 - rate)


# ---------------------------------------------------------------------------------------------------------------------
# Buffers: a deque a kind, newest last. Beyond its maxlen the OLDEST leave, so it never freezes


def sample(buffer, k, rng):
    """k tasks of a buffer, or all where it holds fewer."""
    return rng.sample(buffer, min(k, len(buffer)))


def seed_buffers(ex, size, n_inputs):
    """A buffer a kind that holds the identity program (the zero triplet), the only task that people wrote."""
    program = "def f(x):\n    return x"
    inputs = ["'a'", "1", "[1, 2]", "'bc'", "0", "[3]", "7", "[]", "'d'", "[4, 4]"]
    made = make_tasks(ex, [(kind, program, inputs[:n_inputs] if kind == "induction" else ["'abc'"], "")
                           for kind in KINDS])
    return {task.kind: deque([task], size) for task, _ in made}


# ---------------------------------------------------------------------------------------------------------------------
# The warm-up generator: the written grammar that stands in for pretraining. A program is a chain of lines, each
# applying an operation to x; its depth is the number of operations. Types are tracked, so programs run. Constants:
# {d} 1-3 (large tier 1-9), {s} 2-4, {m} 3-9, {n} 10-40, {c} {e} letters.
#
# The small tier is what a network of 650,000 weights masters in minutes: with modulo, sums and constants to 9
# it still erred on one operation in five after 4 minutes, and what RL was left to teach was the multiplication table.
# Here single operations are nearly always right, and what is left to learn is depth, searching and checking.

OPS = {  # the small tier: type -> [(word of the message, type after, expression)]
    "int": [
        (" add", "int", "x + {d}"), (" sub", "int", "x - {d}"), (" mul", "int", "x * 2"), (" div", "int", "x // 2"),
        (" if", "int", "x + {d} if x > {s} else x - {d}"), (" pair", "list", "[x, x + {d}]"),
    ],
    "list": [
        (" reverse", "list", "x[::-1]"), (" sort", "list", "sorted(x)"), (" drop", "list", "x[1:]"),
        (" keep", "list", "x[:-1]"), (" append", "list", "x + [{d}]"), (" prepend", "list", "[{d}] + x"),
        (" add", "list", "[v + {d} for v in x]"), (" sub", "list", "[v - {d} for v in x]"),
        (" mul", "list", "[v * 2 for v in x]"), (" filter", "list", "[v for v in x if v > {s}]"),
        (" if", "list", "x[1:] if len(x) > {s} else x + [{d}]"), (" len", "int", "len(x)"),
        (" max", "int", "max(x)"), (" min", "int", "min(x)"), (" first", "int", "x[0]"), (" last", "int", "x[-1]"),
    ],
    "str": [
        (" reverse", "str", "x[::-1]"), (" upper", "str", "x.upper()"), (" swap", "str", "x.swapcase()"),
        (" drop", "str", "x[1:]"), (" keep", "str", "x[:-1]"), (" append", "str", "x + '{c}'"),
        (" prepend", "str", "'{c}' + x"), (" replace", "str", "x.replace('{c}', '{e}')"), (" double", "str", "x + x"),
        (" if", "str", "x.upper() if len(x) > {s} else x + '{c}'"), (" count", "int", "x.count('{c}')"),
        (" len", "int", "len(x)"),
    ],
}
LARGE_OPS = {  # the larger tier adds arithmetic, and blocks and loops: one operation of two to four lines
    "int": [
        (" mul", "int", "x * {s}"), (" mod", "int", "x % {m}"), (" div", "int", "x // {s}"),
        (" if", "int", "x * {s} if x % 2 == 0 else x + {d}"), (" abs", "int", "abs(x - {n})"),
        (" add", "int", "x + {n}"), (" sub", "int", "x - {n}"),
        (" loop", "int", "\n    for v in range({s}):\n        x = x + {d}"),
        (" loop", "int", "\n    for v in range({s}):\n        x = x * 2 - {d}"),
        (" if", "int", "\n    if x > {n}:\n        x = x - {n}\n    else:\n        x = x + {d}"),
    ],
    "list": [
        (" sum", "int", "sum(x)"), (" mul", "list", "[v * {s} for v in x]"), (" mod", "list", "[v % {m} for v in x]"),
        (" filter", "list", "[v for v in x if v % 2 == 0]"), (" add", "list", "[v + len(x) for v in x]"),
        (" filter", "list", "[v for v in x if v not in [{d}, {d}]]"),
        (" loop", "int", "\n    y = 0\n    for v in x:\n        y = y * 2 + v\n    x = y"),
        (" loop", "list", "\n    y = []\n    for v in x:\n        y = [v] + y + [{d}]\n    x = y"),
        (" if", "list", "\n    if sum(x) > {n}:\n        x = x[1:]\n    else:\n        x = x + [{d}]"),
    ],
    "str": [
        (" loop", "str", "\n    for v in range({s}):\n        x = x[1:] + '{c}'"),
        (" if", "str", "\n    if '{c}' in x:\n        x = x.replace('{c}', '{e}')\n    else:\n        x = '{c}' + x"),
    ],
}
MAX_DEPTH = 6
GUESSES = (40, 25, 15, 10, 10)     # weights of 0, 1, ... wrong tries in a demonstrated search
MAX_TRIES = len(GUESSES) - 1
DECISIVE = 3         # weight in the warm-up's loss of what decides a search: verdicts, and abduction's candidates


def random_value(rng, type_, large=False):
    """A random input."""
    if type_ == "int":
        return rng.randint(0, 60 if large else 12)
    size = rng.randint(2, 6 if large else 4)
    if type_ == "str":
        return "".join(rng.choice("abcABC" if rng.random() < 0.3 else "abc") for _ in range(size))
    return [rng.randint(0, 9) for _ in range(size)]


def near_miss(rng, value):
    """An input one slip away from `value`: what a network that guesses almost right would write. Compared with random
    inputs alone, demonstrations with these teach the network to tell an output from nearly the same output."""
    if isinstance(value, int):
        return value + rng.choice((-2, -1, 1, 2))
    k = rng.randrange(len(value) + 1)
    other = [rng.randint(0, 9)] if isinstance(value, list) else rng.choice("abcABC")
    changed, longer = value[:k] + other + value[k + 1:], value[:k] + other + value[k:]
    return rng.choice((changed, changed, longer, value[:k] + value[k + 1:]))     # now and then `value`, dropped later


def random_op(rng, type_, large=False):
    """(word, type after, line with its indentation)."""
    ops = OPS[type_] + (LARGE_OPS[type_] if large else [])
    word, after, expr = rng.choice(ops)
    fill = {"d": range(1, 10 if large else 4), "s": range(2, 5), "m": range(3, 10), "n": range(10, 41), "e": "abcd",
            "c": rng.choice("abc")}  # each constant is drawn anew, except that {c} means one letter throughout
    line = re.sub(r"\{([dsmnce])\}", lambda m: str(rng.choice(fill[m[1]])), expr)
    return word, after, line if line.startswith("\n") else "\n    x = " + line


def join_program(lines):
    return "def f(x):" + "".join(lines) + "\n    return x"


def random_program(rng, depth, large=False):
    """(lines, words, type of its input): `depth` operations in a chain."""
    type_ = first = rng.choices(("list", "str", "int"), (5, 3, 2))[0]
    lines, words = [], []
    for k in range(depth):
        word, after, line = random_op(rng, type_, large)
        if after == "int" and type_ != "int" and k + 1 < depth and rng.random() < 0.7:  # few operations take an int
            word, after, line = random_op(rng, type_, large)
        lines.append(line)
        words.append(word)
        type_ = after
    return lines, words, first


ASSIGN = re.compile(r"^( +)([xy]) = .*$", re.M)


BAR = "\u241e"        # between the entries of a trace: no value holds it


# Behind the line "    x = x[::-1]" comes "    t.append(f'0:{x!r}')", and so on; the result for [1, 2] is then
# "0:[2, 1]|-1:[2, 1]" with BAR in place of |
def traced(program):
    """The program with a recorder behind each assignment; it returns 'k:value|k:value|...' in order of execution, k the
    number of the assignment in the text, the last entry being the result. For the generator's own programs only."""
    k = iter(range(1000))
    body = ASSIGN.sub(lambda m: f"{m[0]}\n{m[1]}t.append(f'{next(k)}:{{{m[2]}!r}}')", program)
    head, _, body = body.partition("\n")
    body, _, _ = body.rpartition("\n    return x")
    return f"{head}\n    t = []\n{body}\n    t.append(f'-1:{{x!r}}')\n    return '{BAR}'.join(t)"


def read_trace(program, result):
    """[(line, value)] of each executed assignment and the final value, from a Result of traced(program); None when it
    failed or a value is too long to be worth reading."""
    if not result.ok:
        return None
    lines = [m[0].strip() for m in ASSIGN.finditer(program)]
    # a Result's value is a repr (ours: the program is the generator's); ast is slow, and seldom needed
    text = ast.literal_eval(result.value) if "\\" in result.value else result.value[1:-1]
    *steps, (_, final) = [entry.partition(":")[::2] for entry in text.split(BAR)]
    if any(len(v) > 28 for _, v in steps) or len(steps) > 16:     # characters, steps: more would fill a reply
        return None
    return [(lines[int(k)], v) for k, v in steps], final


def think_trace(steps):
    """Ids of a trace: each executed line again, with the value after it as a comment, which makes each step local."""
    return [t for line, value in steps for t in encode(f"\n    {line}  # {value}")]


def think_back(start, steps):
    """Ids of a trace read backwards: each executed line, the last one first, with the value before it. This is how to
    get from an output to an input that gives it, and as local as the trace."""
    before = [start] + [value for _, value in steps]
    return [t for (line, _), value in reversed([*zip(steps, before)]) for t in encode(f"\n    {line}  # from {value}")]


# ---------------------------------------------------------------------------------------------------------------------
# Demonstrations for the warm-up: (prompt, reply, weights), a weight in the loss for each token of the reply; 0 for what
# is shown but not imitated


def demo(prompt, *parts):
    """parts: each an int, a str or a list of ids, or a pair (such a part, its weight) where the weight is not 1."""
    reply, weights = [], []
    for part in parts:
        part, weight = part if isinstance(part, tuple) else (part, 1)
        ids = [part] if isinstance(part, int) else encode(part) if isinstance(part, str) else part
        reply += ids
        weights += [weight] * len(ids)
    return prompt, reply, weights


@dataclass
class Draw:
    """A generated program with everything the executor said about it."""
    program: str
    lines: list
    words: list
    type: str                  # of the inputs
    value: object              # the first input as data
    inputs: list
    traces: list = None        # per input: ([(line, value)], final value)

    def message(self, rng, keep=0.9):
        return "".join(w for w in self.words if rng.random() < keep)

    def task(self, kind, rng):
        n = len(self.inputs) if kind == "induction" else 1
        outputs = [final for _, final in self.traces[:n]]
        message = self.message(rng) if kind == "induction" else ""
        return Task(kind, self.program, self.inputs[:n], outputs, [], message, len(self.lines))


def ban(tasks):
    """What may not enter warm-up or self-play: every (program, input) of the tasks, and from depth 2 on their programs.
    There are so few programs of depth 1 that banning them would leave nothing to learn from; so an abduction task of
    depth 1 (program and output) may be met with another input that gives the same output, and a third of them are."""
    return {t.program for t in tasks if t.depth > 1} | {(t.program, i) for t in tasks for i in t.inputs}


def is_banned(program, inputs, banned):
    return program in banned or any((program, i) in banned for i in inputs)


def draw_programs(ex, rng, depths, n_inputs=1, large=False, banned=frozenset()):
    """(draws, hits): a Draw for each depth asked for, and how many banned ones (the held-out suite's) were thrown away.
    Each is drawn anew until it is not banned, has at most MAX_PROGRAM tokens and no line twice, its inputs differ and
    run, the hidden outputs of several are not all equal, and each operation changes x on the first input. (Ints are
    few, so 6 % of induction's programs take one, 20 % of the others'; fewer where the suite's are banned.)"""
    draws, todo, hits = [None] * len(depths), list(range(len(depths))), 0
    while todo:
        tried, jobs = [], []
        for slot in todo:
            lines, words, type_ = random_program(rng, depths[slot], large)
            values = [random_value(rng, type_, large) for _ in range(n_inputs)]
            d = Draw(join_program(lines), lines, words, type_, values[0], [repr(v) for v in values])
            if is_banned(d.program, d.inputs, banned):
                hits += 1
                continue
            if len(set(d.inputs)) < n_inputs or len(encode(d.program)) > MAX_PROGRAM or len(set(lines)) < len(lines):
                continue
            tried.append((slot, d))
            jobs += [(traced(d.program), i) for i in d.inputs]
        results = iter(ex.run(jobs, check=False))  # our own operations are deterministic
        for slot, d in tried:
            d.traces = [read_trace(d.program, next(results)) for _ in d.inputs]
            if None in d.traces or max(len(encode(f)) for _, f in d.traces) > MAX_VALUE \
                    or n_inputs > 1 and hidden_agree([f for _, f in d.traces]):
                continue
            path = [d.inputs[0]] + [v for line, v in d.traces[0][0] if line[0] == "x"]     # a loop's y is part of one
            if all(a != b for a, b in zip(path, path[1:])):    # an operation that changes nothing adds no depth
                draws[slot] = d
        todo = [slot for slot in todo if draws[slot] is None]
    return draws, hits


def solver_depth(rng):
    """Geometrically rarer depth, each a quarter as frequent as the one before: the base solves shallow tasks well and
    deep ones sometimes, so there is a frontier for self-play to move."""
    return min(MAX_DEPTH, 1 + int(rng.expovariate(math.log(4))))


def wrong_candidates(rng, kind, d, large=False, banned=frozenset()):
    """[(program, input)] that stand for a solver's guesses on the way to the answer; those that turn out right are
    dropped later. MAX_TRIES of them end a search without success. Held-out ones are left out like everywhere else."""
    found = []
    for _ in range(rng.choices(range(MAX_TRIES + 1), GUESSES)[0] if kind != "deduction" else 0):
        if kind == "abduction":      # inputs near the right one, and others of its type
            value = near_miss(rng, d.value) if rng.random() < 0.6 else random_value(rng, d.type, large)
            program, arg = d.program, repr(value)
        else:                        # the program with one line drawn anew, run on the first shown input
            lines, k = d.lines[:], rng.randrange(len(d.lines))
            lines[k] = random_program(rng, 1, large)[0][0]
            program, arg = join_program(lines), d.inputs[0]
        if not is_banned(program, [arg], banned):
            found.append((program, arg))
    return found


def shown_search(failed, right, budget, rng, patience):
    """(parts for `demo`, whether it gave up) of a demonstrated search: wrong tries, then the right one, each a list
    of parts.

    After each wrong try the search goes on with probability `patience`; it also ends after MAX_TRIES and with the
    budget (tokens). It then answers with its last candidate, so that the network learns to end a reply in time. A
    base of little patience stands for what web text shows."""
    def size(try_):
        return len(demo([], *try_)[1])
    parts, used = [], 0
    for try_ in failed:
        if used + size(try_) > budget:
            break
        parts += [TRY, *try_, (WRONG, DECISIVE)]
        used += size(try_) + 2
        if rng.random() > patience:
            return parts, True
    if parts and (len(failed) == MAX_TRIES or used + size(right) > budget):
        return parts, True
    return [*parts, TRY, *right, (RIGHT, DECISIVE)], False


# of a hundred demonstrations of the warm-up, how many each cell has
SHARES = {("propose", "deduction"): 5, ("propose", "abduction"): 5, ("propose", "induction"): 5,
          ("solve", "deduction"): 28, ("solve", "abduction"): 27, ("solve", "induction"): 30}


def demonstrations(ex, rng, n, cfg, banned=frozenset()):
    """n demonstrations drawn over all six cells (cfg: references, n_inputs, large, hasty, patience, timid, max_new).
    Returns (list, hits): how many drawn programs were thrown away because they are the held-out suite's.

    The proposer's go to MAX_DEPTH, somewhat rarer (6:5:4:3:2:1), the solver's geometrically: the base can write far
    more than it can solve. A timid one has seldom seen more than one operation proposed, and must find out itself."""
    cells = rng.choices(list(SHARES), SHARES.values(), k=n)
    deep = range(1, MAX_DEPTH + 1)
    weights = [10.0 ** -d for d in deep] if cfg.timid else deep[::-1]
    depths = [rng.choices(deep, weights)[0] if role == "propose" else solver_depth(rng) for role, _ in cells]
    draws, hits = [None] * n, 0
    for n_inputs in (1, cfg.n_inputs):                   # induction wants N inputs a program
        mine = [i for i, (_, kind) in enumerate(cells) if (kind == "induction") == (n_inputs > 1)]
        found, refused = draw_programs(ex, rng, [depths[i] for i in mine], n_inputs, cfg.large, banned)
        hits += refused
        for i, d in zip(mine, found):
            draws[i] = d
    pool = [d for d, (_, kind) in zip(draws, cells) if kind != "induction"]     # references of the proposer's prompts
    guesses = [wrong_candidates(rng, kind, d, cfg.large, banned) if role == "solve" else []
               for d, (role, kind) in zip(draws, cells)]
    traces = iter(ex.run([(traced(program), arg) for mine in guesses for program, arg in mine], check=False))
    demos = []
    for d, (role, kind), mine in zip(draws, cells, guesses):
        failed = [(program, arg, read_trace(program, next(traces))) for program, arg in mine]
        if role == "solve":
            failed = [(program, arg, t[0]) for program, arg, t in failed if t and t[1] != d.traces[0][1]]
            demos.append(solver_demo(rng, kind, d, failed, cfg))
        elif kind == "induction":
            parts = [part for i in d.inputs for part in (INPUT, i)]
            demos.append(demo(propose_prompt(kind, [d.task(kind, rng)]), *parts, MESSAGE, d.message(rng), END))
        else:
            # Early on a buffer holds one task, so where K > 2 fewer are shown too: a start network that had always seen
            # four took a lone one for induction's prompt, and none of its first proposals parsed. After K = 2 97 % do
            count = rng.randint(1, cfg.references) if cfg.references > 2 else cfg.references
            shown = [p.task("deduction", rng) for p in sample(pool, count, rng)]
            demos.append(demo(propose_prompt(kind, shown), PROGRAM, d.program, INPUT, d.inputs[0], END))
    return demos, hits


def solver_demo(rng, kind, d, failed, cfg):
    """A solver's reply to the task of a Draw: a thought, then the answer. failed: [(program, input, trace)], the wrong
    tries that a search may show."""
    steps, last = d.traces[0][0], None
    if kind == "deduction" and rng.random() < cfg.hasty:
        thought = []
    elif kind == "deduction":
        thought = [think_trace(steps)]
    else:
        tries = [one_try(kind, arg, trace, False) for _, arg, trace in failed]
        thought, given_up = shown_search(tries, one_try(kind, d.inputs[0], steps, True), int(0.7 * cfg.max_new), rng,
                                         cfg.patience)
        if given_up:                                     # it answers with its last candidate, which is not imitated
            program, arg, _ = failed[thought.count(TRY) - 1]   # the last one shown
            last = (arg if kind == "abduction" else program, 0)
    task = d.task(kind, rng)
    return demo(solve_prompt(task), *thought, ANSWER, last or gold_answer(task), END)


def gold_answer(task):
    if task.kind in OUTPUT_KINDS:
        return task.outputs[0]
    return task.inputs[0] if task.kind == "abduction" else task.program


def one_try(kind, arg, steps, right):
    """A candidate with its check, as parts for `demo`. In a wrong one the candidate is not imitated, only the check.

    abduction: backwards from the wanted output to an input, then forwards to see what that gives. induction: a program
    written line by line while it runs on the first shown input."""
    if kind == "abduction":
        return [(think_back(arg, steps), int(right)), (INPUT, DECISIVE), (arg, DECISIVE * right), think_trace(steps)]
    return [part for line, value in steps for part in ((f"\n    {line}", int(right)), f"  # {value}")]


def gold(draw, task, worked):
    """A labelled example (prompt, reply, weights) of a generated task: its gold answer, after a thought if `worked`."""
    steps, thought = draw.traces[0][0], []
    if worked and task.kind in OUTPUT_KINDS:
        thought = [think_trace(steps)]
    elif worked:
        thought = [TRY, *one_try(task.kind, task.inputs[0], steps, True), (RIGHT, DECISIVE)]
    return demo(solve_prompt(task), *thought, ANSWER, gold_answer(task), END)


def main():
    """One prompt, reply, parse and reward for each of the six role x kind cells, the replies from the generator."""
    rng, n = random.Random(3), 4
    with Executor(workers=1, unsafe="--unsafe_executor" in sys.argv) as ex:
        for kind in KINDS:
            (draw,), _ = draw_programs(ex, rng, [2], n if kind == "induction" else 1)
            (task, _), = make_tasks(ex, [(kind, draw.program, draw.inputs, draw.message(rng, 1.0))])
            shown, parts = task, [*(p for i in task.inputs for p in (INPUT, i)), MESSAGE, task.message]
            if kind != "induction":
                shown = draw_programs(ex, rng, [1])[0][0].task(kind, rng)
                parts = [PROGRAM, task.program, INPUT, task.inputs[0]]
            prompt, reply, _ = demo(propose_prompt(kind, [shown]), *parts, END)
            show("propose", kind, prompt, reply)
            program, inputs, message = parse_proposal(kind, reply, n)
            verdict = fault(kind, program or task.program, inputs, message, MAX_DEPTH) or "valid"
            print(f"parse   inputs {', '.join(inputs)}" + f" message {message!r}" * (kind == "induction"))
            print(f"verdict {verdict}, outputs {', '.join(task.outputs)}\nreward  " + ", ".join(
                f"{propose_reward(verdict, r):+.2f}" for r in (0.0, 0.5, 0.875)) + " at solve rates 0, 0.5, 0.875")
            prompt, reply, _ = gold(draw, task, worked=True)
            show("solve", kind, prompt, reply)
            answer = parse_answer(reply)
            verdict, = judge_answers(ex, [task], [answer])
            print(f"parse   {answer!r}\nverdict {verdict}, reward {SOLVE_REWARD[verdict]:+.1f}")


def show(role, kind, prompt, reply):
    print("-" * 79 + f"\n{role} {kind}, {len(prompt)} + {len(reply)} tokens\n\nprompt  {decode(prompt)}\n\n"
          f"reply   {decode(reply)}\n")


if __name__ == "__main__":
    try:
        main()
    except Unusable as error:                        # no kernel wall stands here
        sys.exit(f"error: {error}")
