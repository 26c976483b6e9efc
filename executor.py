"""
executor.py: the only teacher. It runs programs that a model wrote and says what they return (arXiv 2505.03335,
section 3.3.3: program integrity, safety, and determinism by Eq. 7).

    with Executor() as ex:
        [r] = ex.run([("def f(x):\n    return x[::-1]", "[1, 2]")])        # r.ok, r.value == "[2, 1]"

The idea. What a program answers is truth for the whole system, so none of it may touch the system:

    trainer      moves text and compares strings; it never parses, evaluates or unpickles what a model wrote
      zygotes    small exec-ed interpreters with four hash seeds, address layouts of their own; they only fork and wait
        child    compiles and runs a batch of plain programs, or one that could reach others, behind a kernel wall
                 (seccomp, rlimits, Landlock): no file, socket, process, signal. Leaves lines in shared memory, and dies

What a child cannot report is read from how it died (timeout, forbidden, crash). A value counts only if another zygote
agrees.

Where this differs from the paper (P) and from the authors' released code (C), and why:
 1) C calls f twice in one process, blind to hash order, addresses and kept state; and takes its "Non-deterministic"
    failure for success. Here two processes with different seeds must agree, four where a set, a hash or a class is in
    play (two elements agree by chance half the time).
 2) C evaluates the solver's answer in the trainer. Here an answer is a literal, parsed in a child: literals().
 3) C and P's figures compare with == inside the run, where an object whose __eq__ says True wins. Here only plain data
    comes out, as text that the trainer compares; expected outputs never go down. Result.key is type-strict (1, 1.0 and
    True differ); equal() is P's ==, asked of the finished texts.
 4) C cuts outputs at 400 characters and keeps the stump as truth. Here an output is whole or an error.
 5) C pastes text into templates: the input `1) or (2`, or a program that defines repr, rewrites the test. Here an input
    is parsed on its own, as one call of f, and made afresh for each run. Where it must be data, ask literals() first.
 6) C scans the imports for banned modules (dotted ones, `os.path`, never match, so `import os` passes). Here imports
    are an allow-list, a few names are refused for tidiness, and the kernel is the wall.
 7) C stops a run after 10 s of wall time; here after 0.2 s of CPU time, which a busy machine hardly changes.

NOT covered: kernel bugs (a dozen system calls remain; against hostile humans use a virtual machine). A program that
takes over its child can state any value of its own f. Any program can read the texts it was sent with (str.format
follows frames), which hold no answers. A result that depends on the recursion or memory limit is accepted (in C code on
the stack's, `ulimit -s`). So is, now and then, one that depends on a few low bits of an address or a hash, on the order
of addresses (half of the time; where they are handed out in order, or not randomised, always), or on the order of a set
of two words (one time in eight); and always one on that of a set of None, built-in types or functions, which is this
Python's. Memory is up to 2 x workers x memory_mb in all. Without seccomp it refuses; with unsafe=True a program that
takes over its child can hold the trainer up for ever.

Try:  python executor.py         # verdicts on good, endless and hostile programs, then the speed
"""
import ast
import builtins
import codecs
import contextlib
import ctypes
import dataclasses
import functools
import gc
import importlib
import itertools
import marshal
import mmap
import opcode
import os
import re
import resource
import signal
import struct
import sys
import time
import types
import typing
import unicodedata     # the compiler wants it for names beyond ASCII; nothing can be imported behind the wall

ZYGOTE = __name__ == "__main__" and sys.argv[1:2] == ["--zygote"]
if not ZYGOTE:     # a fork costs by the page, so a zygote loads nothing that only the trainer's side needs
    import random
    import subprocess
    import threading
    from concurrent.futures import ThreadPoolExecutor
    from timeit import timeit

CHARS = 8192           # longer programs, and inputs of twice that, are "syntax"; longer outputs "output", never cut
DEPTH = 60             # nesting of an output; also what ends a cyclic one
AREA = 1 << 18         # bytes of shared memory for the records of a batch; when full, the rest goes to another child
BATCH = 128            # programs a child at the most
# PYTHONHASHSEED of the zygotes, fixed so that a run can be repeated: of pairs of lower-case letters 98 % come in both
# orders (for these the four were searched, Python 3.11), of pairs of words 85 to 90 %, as with any four
SEEDS = (0, 58, 26, 260)


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    ok: bool
    value: str = ""    # repr of the output, sets sorted (dicts too, where their order is that of a set)
    key: str = ""      # equal keys = equal values of equal types: dicts sorted too, nan equals nan
    error: str = ""    # '' syntax forbidden no_f timeout memory output nondeterministic crash, or an exception's name


# ---------------------------------------------------------------------------------------------------------------------
# In a child: plain data in, plain data out

class NotPlain(Exception):
    """The output is no plain data, or is too long, too deep or cyclic."""


class Forbidden(ModuleNotFoundError):
    """Raised in a program that reaches for what it may not have: `try: import numpy` can fall back."""


def plain(x, sort, count, depth=0):
    """The canonical text of x: its repr with sets sorted, and if sort dicts too. `type(x)`, not isinstance: __class__
    can lie, and with exact types no code of the program runs here. count bounds the work."""
    kind = type(x)
    if type(kind) is not type or depth > DEPTH or next(count) > CHARS:
        raise NotPlain     # `is not type`: a metaclass could answer the comparisons below
    if kind is complex:
        x = complex(x.real + 0.0, x.imag + 0.0)     # -0.0 to 0.0: repr would write (-0-2j), which reads as -2j
    if x is None or kind in (bool, float, complex) or kind in (str, bytes) and len(x) < CHARS \
            or kind is int and x.bit_length() <= 14000:     # 4,200 digits: Python refuses to print more than 4,300
        return repr(x)
    if kind not in (list, tuple, dict, set, frozenset) or 3 * len(x) > CHARS:     # an item is "1, " or longer
        raise NotPlain
    if kind is dict:
        items = [plain(k, sort, count, depth + 1) + ": " + plain(v, sort, count, depth + 1) for k, v in x.items()]
        return "{" + ", ".join(sorted(items) if sort else items) + "}"
    items = [plain(v, sort, count, depth + 1) for v in x]
    if kind is list:
        return "[" + ", ".join(items) + "]"
    if kind is tuple:
        return "(" + ", ".join(items) + (",)" if len(items) == 1 else ")")
    text = "{" + ", ".join(sorted(items)) + "}" if items else ""
    return f"frozenset({text})" if kind is frozenset else text or "set()"


def texts(x):
    """(value, key), of which the key is empty where no dict can make it another."""
    value = plain(x, False, itertools.count())
    if len(value) > CHARS:
        raise NotPlain
    return value, plain(x, True, itertools.count()) if "{" in value else ""


class Numbers(dict):
    """Each look-up makes one of its own: {nan, nan} has two items."""

    def __getitem__(self, name):
        return dict.__getitem__(self, name) + 0


NUMBERS = Numbers({name: complex(name) if name[3:] else float(name) for name in ("inf", "nan", "infj", "nanj")})
MAKERS = {"set": set, "frozenset": frozenset, "float": float}


class AsConstants(ast.NodeTransformer):
    """Makes constants of what repr writes and ast.literal_eval does not read: inf, nan, frozenset({1}) and so on."""

    def visit_Name(self, node):
        return ast.Constant(NUMBERS[node.id]) if node.id in NUMBERS else node

    def visit_Call(self, node):
        if type(node.func) is not ast.Name or node.func.id not in MAKERS or node.keywords:
            raise ValueError("not a literal")
        return ast.Constant(MAKERS[node.func.id](*[ast.literal_eval(self.visit(a)) for a in node.args]))


def call(args):
    """The text between the brackets of f(...) -> the code of that call. Parsed on its own: a bracket that closes it
    early does not give one call of `f`. The newline ends a trailing comment."""
    tree = ast.parse("f(" + args + "\n)", mode="eval")
    if type(tree.body) is not ast.Call or type(tree.body.func) is not ast.Name \
            or ":=" in args and any(type(node) is ast.NamedExpr for node in ast.walk(tree)):
        raise ValueError("not arguments, or they bind names")
    return compile(tree, "<input>", "eval", 0, True)


# ---------------------------------------------------------------------------------------------------------------------
# In a child: the name gate. It keeps batches clean and verdicts clear. It is NOT the wall, so it may be wrong at times.

MODULES = ("math cmath collections collections.abc itertools functools operator re heapq bisect string copy typing "
           "__future__ abc enum dataclasses unicodedata").split()
HIDDEN = {"Formatter", "ForwardRef", "get_type_hints", "evaluate_forward_ref"}     # follow paths, or evaluate text
NO_BUILTINS = "open eval exec compile input globals help breakpoint id".split()
FORBIDDEN = set("""__subclasses__ __bases__ __base__ __mro__ mro __globals__ __builtins__ __loader__ __spec__ __code__
    __closure__ __self__ __traceback__ __import__ __lazy_import__ __getattribute__ __reduce__ __reduce_ex__ tb_frame
    tb_next gi_frame gi_code gi_yieldfrom cr_frame cr_code ag_frame ag_code f_back f_globals f_locals f_builtins f_code
    _evaluate""".split())
# What could reach a neighbour in the batch (classes, attributes of shared objects) gets a child of its own:
OWN_CHILD = set("""type object super getattr setattr delattr vars locals register attrgetter methodcaller wraps abc enum
    update_wrapper total_ordering cached_property singledispatchmethod final no_type_check no_type_check_decorator
    runtime_checkable override overload dataclass_transform disjoint_base dataclasses evaluate obj Annotated RegexFlag
    get_origin TypeForm format format_map""".split())     # format follows frames to what is ours, or a neighbour left
op = opcode.opmap.get
OWN_CHILD_OPS = {op("LOAD_BUILD_CLASS"), op("STORE_ATTR"), op("DELETE_ATTR"), op("MATCH_CLASS")}
# ... and a generator with `try` or `with`, which when it is collected can bring back memory, for good. Its code's flags
# (also a coroutine's, an asynchronous generator's), and its operations, by version of Python
GENERATOR, HANDLERS = 0x20 | 0x80 | 0x200, {op("PUSH_EXC_INFO"), op("SETUP_FINALLY"), op("SETUP_WITH")} - {None}
SET_OPS = {op("BUILD_SET"), op("SET_ADD"), op("SET_UPDATE")}
SET_NAMES = set("set frozenset hash keys items KeysView ItemsView".split())     # views make sets with & | ^ -


def gate(*stack):
    """-> lane (batch, own or forbidden), and whether the result may depend on a hash or an address. Reads code objects,
    not text: these show f-strings, decorators and every form of import, in 2 us; a syntax tree would cost 100."""
    names, ops, constants, revives, stack = set(), set(), [], False, [*stack]
    for code in stack:
        names.update(code.co_names)
        ops.update(mine := code.co_code[::2])
        revives = revives or code.co_flags & GENERATOR and not HANDLERS.isdisjoint(mine)
        constants += code.co_consts
        stack += [c for c in code.co_consts if type(c) is types.CodeType]
    patterns = [c for c in constants if type(c) is tuple] if op("MATCH_CLASS") in ops else []     # have names
    found = FORBIDDEN & names.union(*patterns)
    if found and (found != {"_evaluate"} or "typing" in names):      # which a class of the program's may well have
        return "forbidden", False
    if revives or ops & OWN_CHILD_OPS or names & OWN_CHILD or any(n.startswith("_") for n in names):
        return "own", True                             # what has classes has addresses
    sets = ops & SET_OPS or names & SET_NAMES or frozenset in map(type, constants)     # `in {1, 2}` holds a frozenset
    return "batch", bool(sets)


def refuse(*args, **kwargs):
    raise Forbidden


def printed(*args, sep=" ", end="\n", file=None, flush=False):
    for x in args:
        str(x)     # which may change something, or fail


def allowed_builtins():
    """The builtins a program sees. Its imports are copies of an allow-list's public names: the real modules hold `sys`
    (re, typing, enum do), tables (copy.dispatch_table) and what they use themselves (typing.ABCMeta, functools.RLock),
    and would keep what a program sets on them."""
    modules = {}
    if "_pylong" in sys.stdlib_module_names:     # which divides big ints. C asks for it by the program's __import__,
        importlib.import_module("_pylong")       # but then takes the real one
        modules["_pylong"] = types.ModuleType("_pylong")
    for name in MODULES:
        real, modules[name] = importlib.import_module(name), types.ModuleType(name)
        public = {k: getattr(real, k) for k in getattr(real, "__all__", vars(real)) if k[0] != "_" and k not in HIDDEN}
        vars(modules[name]).update({k: v for k, v in public.items()     # typing makes some only when asked for them
                                    if not isinstance(v, (types.ModuleType, dict, list, set))})
    modules["collections"].abc = modules["collections.abc"]
    copier = modules["copy"].deepcopy     # a default is a list, which a class of the program's could get at
    copier.__defaults__ = tuple(object() if d == [] else d for d in copier.__defaults__)
    attrgetter, methodcaller = modules["operator"].attrgetter, modules["operator"].methodcaller

    def checked(name):
        return refuse() if isinstance(name, str) and not FORBIDDEN.isdisjoint(str.split(name, ".")) else name

    def guarded_import(name, globals=None, locals=None, fromlist=(), level=0):
        return refuse() if level or name not in modules else modules[name if fromlist else name.split(".")[0]]

    modules["operator"].attrgetter = lambda *names: attrgetter(*[checked(n) for n in names])
    modules["operator"].methodcaller = lambda name, *a, **k: methodcaller(checked(name), *a, **k)
    return {**vars(builtins), **{name: refuse for name in NO_BUILTINS}, "print": printed,
            "__import__": guarded_import, "__lazy_import__": guarded_import,     # of Python 3.15: here as soon as asked
            "getattr": lambda x, name, *d: getattr(x, checked(name), *d)}


# ---------------------------------------------------------------------------------------------------------------------
# In a child: one run, and a batch of them

ERROR_NAMES = {id(e): e.__name__ for e in vars(builtins).values()
               if isinstance(e, type) and issubclass(e, BaseException)}
ERROR_NAMES |= {id(MemoryError): "memory", id(NotPlain): "output", id(Forbidden): "forbidden"}
real_mro = type.__dict__["__mro__"].__get__     # a metaclass may lie about __mro__, __name__ and __hash__
DECISIONS = (ast.If, ast.IfExp, ast.For, ast.While, ast.ExceptHandler, ast.match_case)


def complexity(program):
    """(nodes of the syntax tree, cyclomatic number: 1 + decisions)."""
    def decisions(node):
        if type(node) is ast.BoolOp:
            return len(node.values) - 1
        return len(node.ifs) + 1 if type(node) is ast.comprehension else isinstance(node, DECISIONS)
    nodes = list(ast.walk(ast.parse(program)))
    return len(nodes), 1 + sum(map(decisions, nodes))


def line(error, value="", key="", sets=False):
    """A record. repr writes tabs and newlines as \\t and \\n, so fields and lines can be told apart."""
    return "\t".join((error, value, key, "sets" if sets else "")).encode()


compiled = functools.lru_cache(1)(compile)     # the inputs of one program stand together in a batch


def judge(program, args, space, own):
    """Run f(args) -> its record; the error "own" asks for a child of its own. All that the program made dies when this
    returns, with the timer still running: __del__ and `finally` can hang too."""
    space, stage = dict(space), "parse"
    try:
        if program is None:         # an answer, see Executor.literals
            return line("", *texts(ast.literal_eval(AsConstants().visit(ast.parse(args.strip(), mode="eval").body))))
        if args is None:            # see Executor.complexity
            return line("", *texts(complexity(program)))
        codes = compiled(program, "<program>", "exec", 0, True), call(args)
        lane, sets = gate(*codes) if space["__builtins__"] is not builtins else ("own", True)
        if lane == "forbidden" or lane == "own" and not own:
            return line(lane)
        stage = "run"
        exec(codes[0], space)
        if not callable(space.get("f")):
            return line("no_f")
        names = Numbers({k: v for k, v in NUMBERS.items() if k not in space})    # inf, nan: as repr writes them
        return line("", *texts(eval(codes[1], space, names)), sets)
    except BaseException as e:
        error = next(ERROR_NAMES[id(t)] for t in real_mro(type(e)) if id(t) in ERROR_NAMES)
        if error == "memory" and not own:      # in a batch a neighbour's leftovers may be to blame
            error = "own"
        elif stage == "parse" and error not in ("output", "forbidden"):
            error = "syntax"        # mostly SyntaxError; but the parser has ValueError (NUL), RecursionError and more
        return line(error)
    finally:
        space.clear()               # f holds its globals, which hold f, and the collector is off
        re.purge()                  # these caches hold its objects too, and would show them to the next program
        for forget in typing._cleanups:
            forget()


def child(jobs, own, area, space, timeout, patience, raise_wall):
    """The life of a fork. The timer counts CPU time and its default action kills: no exception that a program could
    swallow, and C code cannot hold it up. A ValueError where the area is full ends this child like any other mishap."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    os.closerange(0, 3)
    raise_wall(len(jobs) * timeout)
    for program, args, _ in jobs:
        signal.setitimer(signal.ITIMER_PROF, timeout)
        signal.setitimer(signal.ITIMER_REAL, patience)     # of the clock, for sleepers; 0, none, behind the wall
        text = judge(program, args, space, own)
        gc.collect(0)           # cycles, which would keep memory that the next program may want
        area.write(text + b"\n")


# ---------------------------------------------------------------------------------------------------------------------
# The kernel wall

# By machine: the audit arch; the calls a child may make (mmap mprotect munmap brk mremap madvise setitimer exit
# clock_gettime exit_group getrandom); those that fail politely since honest code causes them (write open openat:
# compile() looks for the source of a bad line). Any other call kills. None of these waits: a child cannot sleep (one
# thread needs no futex), nor block a signal, and what does not sleep ends by its CPU time.
SYSCALLS = {"x86_64": (0xC000003E, (9, 10, 11, 12, 25, 28, 38, 60, 228, 231, 318), (1, 2, 257)),
            "aarch64": (0xC00000B7, (222, 226, 215, 214, 216, 233, 103, 93, 113, 94, 278), (64, 56))}
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
libc = ctypes.CDLL(None)


def seccomp_filter():
    """A BPF program: load the arch, compare; load the number of the call, compare with each; kill."""
    arch, allow, polite = SYSCALLS[os.uname().machine]
    load, jump_if_equal, ret, kill = 0x20, 0x15, 0x06, 0x80000000
    code = [(load, 0, 0, 4), (jump_if_equal, 1, 0, arch), (ret, 0, 0, kill), (load, 0, 0, 0)]
    for number in allow + polite:
        verdict = 0x7FFF0000 if number in allow else 0x00050001     # allow; errno EPERM
        code += [(jump_if_equal, 0, 1, number), (ret, 0, 0, verdict)]
    code = b"".join(struct.pack("HBBI", *c) for c in code + [(ret, 0, 0, kill)])
    code_buffer = ctypes.create_string_buffer(code, len(code))
    return ctypes.create_string_buffer(struct.pack("HP", len(code) // 8, ctypes.addressof(code_buffer))), code_buffer


def guard(memory_mb, wall):
    """Once in each zygote, inherited by its children. Returns the last step, which each child takes for itself."""
    sys.stdin = sys.stdout = sys.stderr = None
    sys.meta_path.clear()     # nothing is imported from here on, so nothing looks at the disk
    with contextlib.suppress(OSError):     # root is exempt from NPROC and may signal anybody: become nobody; who may
        os.setgroups([])                   # not, stays. The seccomp filter does not ask who we are
        os.setgid(65534)
        os.setuid(65534)
    if wall:
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        all_access = ctypes.c_uint64((1 << 13) - 1)     # Landlock: handle every file access and allow none; an extra
        ruleset = libc.syscall(444, ctypes.byref(all_access), 8, 0)     # that kernels before 5.13 do not have
        if ruleset >= 0:
            libc.syscall(446, ruleset, 0)
            os.close(ruleset)
    program = seccomp_filter() if wall else None
    for name, limit in ("AS", memory_mb << 20), ("FSIZE", 0), ("CORE", 0), ("NOFILE", 0):
        kind = getattr(resource, "RLIMIT_" + name)
        hard = resource.getrlimit(kind)[1]     # which only root may raise
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        with contextlib.suppress(*() if wall else (ValueError, OSError)):     # without a wall the others still help
            resource.setrlimit(kind, (limit, limit))

    def raise_wall(cpu_seconds):
        resource.setrlimit(resource.RLIMIT_CPU, (int(cpu_seconds) + 2, int(cpu_seconds) + 3))     # if a timer fails
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
        if sys.platform == "linux" and libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) \
                or wall and libc.prctl(PR_SET_SECCOMP, 2, program[0], 0, 0):
            os._exit(9)       # no wall, no run
    return raise_wall


def wall_stands(raise_wall):
    """Behind it a child must be able to compute, fail to open, and die when it forks, signals or makes a socket."""
    trials = ((lambda: bytearray(1 << 20), 0), (lambda: libc.open(b"/", 0) < 0 or os._exit(8), 0),
              (os.fork, signal.SIGSYS), (lambda: os.kill(os.getpid(), 0), signal.SIGSYS),
              (lambda: libc.socket(2, 1, 0), signal.SIGSYS))
    return all(forked(lambda: (raise_wall(1), trial())) == end for trial, end in trials)


# ---------------------------------------------------------------------------------------------------------------------
# The zygote: forks children, waits for them, reads their records. It never looks into a program.

def forked(work):
    """Do work in a child -> how it ended, in the words of os.waitpid."""
    pid = os.fork()
    if not pid:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def run_child(jobs, own, *how):
    """-> the lines a child left, and why there are no more, as an error."""
    for _ in range(3):
        area = mmap.mmap(-1, AREA)     # zeros, and no line holds one
        status = forked(lambda: child(jobs, own, area, *how))
        if status != signal.SIGKILL:     # that is from outside, say a system short of memory: once more
            break
    lines = area[:area.find(b"\0")].split(b"\n")[:-1][:len(jobs)]     # whole ones, and no more
    ends = {signal.SIGPROF: "timeout", signal.SIGALRM: "timeout", signal.SIGXCPU: "timeout", signal.SIGSYS: "forbidden"}
    return lines, ends.get(os.WTERMSIG(status), "crash")


def serve(jobs, *how):
    """The lines of a request. What ends a batch is blamed on the program that ran then only once it has ended a child
    of its own too (a timeout is always its own fault); the programs behind it go to a new child."""
    lines = []
    while len(lines) < len(jobs):
        done, end = run_child(jobs[len(lines):], False, *how)
        lines += done
        if len(lines) < len(jobs):
            lines.append(line(end if end == "timeout" else "own"))
    for i in [i for i, text in enumerate(lines) if text.startswith(b"own\t")]:
        done, end = run_child([jobs[i]], True, *how)
        lines[i] = done[0] if done else line(end)
    return b"\n".join(lines) + b"\n"


def zygote(timeout, memory_mb, gated, wall, trainer):
    """Runs as `python executor.py --zygote ...`. Reads a request whole before it answers, so the pipes cannot lock up.
    Ends when its request pipe closes or the trainer is gone."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())     # what the trainer blocks or ignores, we would inherit
    for number in (signal.SIGPROF, signal.SIGXCPU, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    space = {"__name__": "program", "__builtins__": allowed_builtins() if gated else builtins}
    # What Python makes or loads at its first use is made now: behind the wall it would fail, or a neighbour see it
    ast.unparse(ast.Constant(1)), importlib.import_module("string").Template.pattern
    for encoding in """ascii latin-1 utf-7 utf-8-sig utf-16 utf-16-le utf-16-be utf-32 utf-32-le utf-32-be cp437 cp850
                       cp1251 cp1252 iso8859-15 koi8-r shift_jis gbk unicode_escape raw_unicode_escape""".split():
        codecs.lookup(encoding)
    codecs.register(refuse)     # of others a program must not think that Python has none
    # where dataclasses looks for what an annotation in quotes names; it wants the real ones
    sys.modules["program"] = types.SimpleNamespace(typing=typing, dataclasses=dataclasses, ClassVar=typing.ClassVar,
                                                   InitVar=dataclasses.InitVar, KW_ONLY=dataclasses.KW_ONLY)
    for _ in range(20):     # the first compile in a process builds tables that otherwise each child would build again
        for sample in "def f(x):\n    return {k: [k] for k in x}", "class C: pass\ndef f(x): return 1 +":
            compiled.cache_clear()
            judge(sample, "[1, -2.5, 'a', {1: (2,)}]", space, True)

    requests, answers = open(0, "rb"), open(1, "wb")

    # Once a second: is the trainer there? PDEATHSIG fires when the *thread* that started us ends, so it is of use only
    # to our own children, which die with us by it
    signal.signal(signal.SIGALRM, lambda *_: os.getppid() == trainer or os._exit(0))
    signal.setitimer(signal.ITIMER_REAL, 1, 1)
    try:
        raise_wall = guard(memory_mb, wall)
        answer = "yes" if not wall or wall_stands(raise_wall) else "the filter does not hold"
    except Exception as e:
        answer = f"{type(e).__name__}: {e}"
    gc.collect()
    # Objects that stay, as many of each size as the hash seed says: addresses then differ below a page too. Now, for
    # what is freed before this line children would fill alike
    kept = [bytes(size) for size in range(0, 480, 16) for _ in range(hash(str(size)) % 64)]
    kept += [bytes(size) for size in range(480, 2048, 16) for _ in range(hash(str(size)) % 8)]
    kept += [types.FunctionType(zygote.__code__, {}) for _ in range(hash("f") % 64)]
    kept += [type("K", (), {}) for _ in range(20 + hash("type") % 64)]
    kept += [object() for _ in range(hash("object") % 64)]
    kept += [float(i) for i in range(200 + hash("float") % 64)]     # 200: those that lie ready from before
    gc.freeze()     # no collection in a child touches, and so copies, the zygote's pages
    gc.disable()
    answers.write(answer.encode() + b"\n")
    answers.flush()
    while answer == "yes":     # until an EOFError: the trainer has closed its pipe
        answers.write(serve(marshal.load(requests), space, timeout, 0 if wall else 2 + 10 * timeout, raise_wall))
        answers.flush()


# ---------------------------------------------------------------------------------------------------------------------
# The trainer's side: text in, text out

def cores():
    """How many CPU cores this process may use: a container's share can be far below what the machine has."""
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError), open("/sys/fs/cgroup/cpu.max") as f:
        quota, period = map(int, f.read().split())    # microseconds; "max" where there is no limit
        n = min(n, -(-quota // period))
    return n


class Unusable(RuntimeError):
    """No wall stands on this system, or no worker can be had any more."""


class Executor(contextlib.AbstractContextManager):
    """workers: pairs of zygotes at work at a time. timeout: CPU seconds of a run. memory_mb: address space of a child,
    the interpreter's 30 MB included. gate=False drops the name gate and hands out the real builtins: only to test the
    wall. Any thread may call run()."""

    def __init__(self, workers=None, timeout=0.2, memory_mb=256, unsafe=False, cache_mb=64, gate=True):
        if not 0 < timeout < 1000 or memory_mb < 48:
            raise ValueError(f"executor: timeout {timeout} s, memory_mb {memory_mb}: give above 0 and at least 48")
        self.workers, self.owner = workers or max(1, cores() // 2), os.getpid()
        self.settings = repr((float(timeout), int(memory_mb), gate, not unsafe, self.owner))
        self.cache, self.old_cache, self.cache_size, self.cache_limit = {}, {}, 0, cache_mb << 19
        self.replaced = 0     # zygotes that died and were started again
        self.seconds = 0.0    # spent in run(), all in all
        if unsafe:
            print("executor: --unsafe_executor: NO KERNEL WALL; programs are held by rlimits and processes only",
                  file=sys.stderr, flush=True)
        self.changed = threading.Condition()     # guards free and the cache
        self.lanes = ThreadPoolExecutor(2 * self.workers)
        started = self.lanes.map(self.start, range(max(len(SEEDS), 2 * self.workers)))
        self.zygotes, answers = map(list, zip(*started))
        self.free = set(range(len(self.zygotes)))
        for answer in answers:
            if answer != "yes":
                self.close()
                raise Unusable(f"executor: no seccomp wall stands on this system ({answer}), so model-written "
                               "programs would run unguarded; to run them with rlimits and processes only, pass "
                               "--unsafe_executor (Executor(unsafe=True))")

    def start(self, i):
        """-> a zygote, and what it says of its wall: yes, or why not."""
        env = {"PYTHONHASHSEED": str(SEEDS[i % len(SEEDS)]),
               "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", "")}      # where libpython may be
        try:
            z = subprocess.Popen([sys.executable, "-S", "-W", "ignore", os.path.abspath(__file__), "--zygote",
                                  self.settings], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                 stderr=subprocess.DEVNULL, cwd="/", start_new_session=True, env=env)
        except OSError as error:     # too few descriptors or processes, say
            raise Unusable(f"executor: no worker can be started ({error})")
        return z, z.stdout.readline().decode().strip() or "it did not start"

    def __exit__(self, *exc):
        self.close()

    def close(self):
        with self.changed:
            zygotes, self.zygotes = self.zygotes, []
        for z in zygotes:
            bury(z)
        self.lanes.shutdown()

    def literals(self, answers):
        """Canonicalise answers, each of which must be a literal as repr writes it."""
        return self.run([(None, text) for text in answers], False)

    def equal(self, pairs):
        """Are two values ==, as the paper compares? So are 1, 1.0 and True, and a set and a frozenset;
        and here, not in Python, nan and nan."""
        results = self.run([("def f(a, b): return a == b", f"[{a}\n], [{b}\n]") for a, b in pairs], False)
        return [a == b or r.value == "True" for (a, b), r in zip(pairs, results)]

    def complexity(self, programs):
        """[(nodes of the syntax tree, cyclomatic number)], (0, 0) for what does not parse. Counted behind the wall too:
        no model text is parsed in this process."""
        return [tuple(map(int, r.value[1:-1].split(", "))) if r.ok else (0, 0)
                for r in self.run([(program, None) for program in programs], False)]

    def run(self, jobs, check=True):
        """[(program, args), ...] -> [Result, ...], in order. check=False: one run, no test of determinism."""
        if not self.zygotes or self.owner != os.getpid():     # a fork has none of our threads, and would wait for ever
            raise RuntimeError("executor: it is closed, or was made by another process")
        start = time.monotonic()
        jobs = [(program, args, check) for program, args in jobs]     # each is its name in the cache too
        with self.changed:
            found = {job: too_long(*job) or self.cache.get(job) or self.old_cache.get(job) for job in jobs}
        order = {}     # the inputs of one program side by side, to compile it once
        fresh = sorted((job for job in found if not found[job]), key=lambda job: order.setdefault(job[0], len(order)))
        # Pieces small enough that endless programs spread over the workers, large enough to make forks cheap
        size = max(8, min(BATCH, len(fresh) // (8 * self.workers) + 1))
        pieces = [fresh[i:i + size] for i in range(0, len(fresh), size)]
        for piece, results in zip(pieces, self.lanes.map(self.settle, pieces)):
            found.update(zip(piece, results))
        with self.changed:
            for job in fresh:
                r = found[job]
                if r.error != "crash" and self.cache_limit:     # a crash may have been our fault
                    self.cache[job] = r
                    self.cache_size += 500 + sum(map(len, (job[0] or "", job[1] or "", r.value, r.key)))
            if self.cache_size > self.cache_limit:     # two generations: the older half is dropped whole
                self.old_cache, self.cache, self.cache_size = self.cache, {}, 0
            self.seconds += time.monotonic() - start
        return [found[job] for job in jobs]

    def settle(self, jobs):
        """-> their Results. Those that gave a value are run again, each time in another process and backwards, so that
        what one program did to the next is not repeated."""
        seen, again = set(), range(len(jobs))
        lines = self.ask(jobs, seen)
        results = [read_line(text) for text in lines]
        for run in range(1, len(SEEDS) if jobs[0][2] else 1):
            again = [i for i in reversed(again) if results[i].ok and (run == 1 or lines[i].endswith(b"\tsets\n"))]
            for i, text in zip(again, self.ask([jobs[i] for i in again], seen) if again else ()):
                if text != lines[i]:
                    r = read_line(text)
                    if r.ok and r.key == results[i].key:      # dicts, filled in the order of a set: equal
                        results[i] = Result(True, r.key, r.key)
                    else:
                        known = r.error in ("timeout", "memory", "crash")
                        results[i] = Result(False, error=r.error if known else "nondeterministic")
        return results

    def ask(self, jobs, seen):
        """Send jobs to a free zygote whose seed they have not seen -> their lines. A zygote that died is replaced, and
        another one asked; nine deaths in a row are beyond any program."""
        for _ in range(9):
            with self.changed:
                i = min(self.changed.wait_for(lambda: self.free - seen))
                self.free.remove(i)
            try:
                z = self.zygotes[i]
                marshal.dump(jobs, z.stdin)
                z.stdin.flush()
                lines = [z.stdout.readline() for _ in jobs]
                if not lines[-1].endswith(b"\n"):
                    raise EOFError
                seen.update(range(i % len(SEEDS), len(self.zygotes), len(SEEDS)))
                return lines
            except Exception:     # it or its pipes died, or close() was called; half an answer must go to nobody else
                if not self.zygotes:
                    raise RuntimeError("executor: closed while programs were running")
                bury(z)
                z, _ = self.start(i)     # if that died too, whoever asks it next will find out
                with self.changed:
                    if self.zygotes:
                        self.zygotes[i] = z
                        self.replaced += 1
                    else:                # close() was called meanwhile
                        bury(z)
            finally:
                with self.changed:
                    self.free.add(i)
                    self.changed.notify_all()
        raise Unusable("executor: its workers die as soon as they are asked; is memory short, or Python gone?")


def bury(z):
    with contextlib.suppress(BrokenPipeError), z:     # z closes its pipes, one with half a request perhaps, and waits
        z.kill()


def too_long(program, args, check):
    """-> the Result of a job that is not worth a parser's time."""
    if {type(program), type(args)} - {str, type(None)}:     # a str of numpy's, say, is none to the zygote
        raise TypeError(f"executor: a job is two str, not {type(program).__name__} and {type(args).__name__}")
    return Result(False, error="syntax") if len(program or "") > CHARS or len(args or "") > 2 * CHARS + 8 else None


def read_line(text):
    """A line -> its Result. A program that took over its child may have written it: it is only text, only compared."""
    if text.count(b"\t") != 3:
        return Result(False, error="crash")
    error, value, key, _ = text.decode("utf-8", "replace").split("\t")
    if error or max(len(value), len(key)) > CHARS or not (value + key).isprintable():     # repr's always are
        return Result(False, error=error if error.isidentifier() and len(error) < 64 else "crash")
    return Result(True, value, key or value)


# ---------------------------------------------------------------------------------------------------------------------
# How fast, and what it says

def small_programs(n, seed=0):
    """n different small programs of the kind a small model writes, each with an input."""
    draw = random.Random(seed)
    lines = ("x = x[::-1]", "x = x + [{}]", "x = [v * {} for v in x]", "x = sorted(x)", "x = x[{}:]", "x.append({})",
             "x = [v for v in x if v > {}]", "x = x + x[:{}]")
    return [("def f(x):\n" + "".join(f"    {draw.choice(lines).format(draw.randrange(9))}\n" for _ in range(i % 4 + 1))
             + f"    return x + [{i}]", repr([draw.randrange(10) for _ in range(i % 5 + 1)])) for i in range(n)]


def bench(unsafe=False):
    """-> programs a second, checked (two runs each or more), beside a fresh interpreter for each (the usual way, one
    run, one after the other) and beside the limit, all cores compiling and running them without any wall, twice; and
    the seconds for 1,000 programs of which 10 are endless, at the default limit."""
    def fresh(program, args):
        subprocess.run([sys.executable, "-c", f"{program}\nprint(repr(f({args})))"], capture_output=True)

    def bare(program, args):     # our own programs, no model's
        space = {}
        exec(program, space)
        repr(eval(f"f({args})", space))

    jobs, mixed = small_programs(10_000), small_programs(1000, seed=1)
    mixed[::100] = [(f"def f(x):\n    while True:\n        x = {i}", "0") for i in range(10)]
    with Executor(unsafe=unsafe) as ex:
        ex.run(small_programs(500, seed=2))
        checked, endless = len(jobs) / timeit(lambda: ex.run(jobs), number=1), timeit(lambda: ex.run(mixed), number=1)
    naive = 30 / timeit(lambda: [fresh(*job) for job in jobs[:30]], number=1)
    limit = len(jobs) / timeit(lambda: [bare(*job) for job in jobs], number=1) * cores() / 2
    return {"checked_per_s": checked, "fresh_process_per_s": naive, "ratio": checked / naive,
            "share_of_limit": checked / limit, "endless_1pct_s": endless}


def main():
    shown = [("reverses a list", "def f(x):\n    return x[::-1]", "[1, 2, 3]"),
             ("adds 1 to a string", "def f(x):\n    return x + 1", "'a'"),
             ("never ends, in C code", "def f():\n    return sum(range(10 ** 15))", ""),
             ("climbs to object", "def f():\n    return ().__class__.__base__.__subclasses__()", ""),
             ("opens a file", "def f():\n    return open('/etc/passwd').read()", ""),
             ("order of a set", "def f(s):\n    return ''.join(set(s))", "'absolute'"),
             ("memory bomb", "def f():\n    return [0] * 10 ** 10", ""),
             ("equal to everything", "class Y:\n    __eq__ = lambda self, x: True\ndef f():\n    return Y()", ""),
             ("input closes the call", "def f(x):\n    return x", "1) or (2")]
    unsafe = "--unsafe_executor" in sys.argv
    with Executor(unsafe=unsafe) as ex:
        for (what, program, args), r in zip(shown, ex.run([job[1:] for job in shown])):
            print(f"{what:22} -> {r.value if r.ok else r.error}")
        print("(syntax: program or input does not parse; output: too large, or no plain data)")
        print("1 and 1.0: keys", *(r.key for r in ex.literals(["1", "1.0"])), "- by ==", *ex.equal([("1", "1.0")]))
    b = bench(unsafe)
    print(f"{b['checked_per_s']:,.0f} checked programs a second, {b['ratio']:.0f}x a fresh process each;\n"
          f"1,000 programs with 1 % endless: {b['endless_1pct_s']:.2f} s")


if __name__ == "__main__":
    if ZYGOTE:
        zygote(*ast.literal_eval(sys.argv[2]))
    else:
        try:
            main()
        except Unusable as error:
            sys.exit(f"error: {error}")
