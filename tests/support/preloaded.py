"""Python processes for tests that start at once, forked from a process that has loaded their libraries.

    process = preloaded().start(["-P", "-m", "fedcore_clients.cli", "run"], env=os.environ, output=log)
    subprocess.run([preloaded().python, "-P", "-m", "fedcore_clients.cli", "status"])

Loading torch takes two seconds of CPU, and a federation of four sites starts ten processes. `python` is an
executable for `-m MODULE` and `-c CODE`; a process that it starts has it as sys.executable, so that its own
children start in the same way. Everything else, such as a training process in a sandbox, is started by the
real interpreter: a forked process does not stand in the namespaces of the process that asked for it.

Two processes fork: for `-m` one that has loaded Fedcore too, for `-c` one that has loaded libraries only, as
the code may replace parts of Fedcore before others import them. Where pidfd_open(2) is missing (all but Linux),
`start` and `python` are the real interpreter.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import marshal
import os
import runpy
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from pathlib import Path

SUPPORTED = hasattr(os, "pidfd_open")
LIBRARIES = (
    "asyncio", "cryptography.x509", "google.protobuf", "numpy", "numpy.ctypeslib", "pydantic", "rich.console",
    "safetensors.torch", "sqlalchemy", "sqlalchemy.dialects.sqlite", "sqlite3", "tomli_w", "torch", "torch.utils.data",
    "torch.utils.serialization", "typer",
)  # fmt: skip
FEDCORE = (
    "fedcore_clients.app", "fedcore_clients.worker", "fedcore_server.app", "fedcore_server.fold_worker",
    "fedcore.learning.site", "fedcore.learning.tracking", "fedcore.cli.main", "fedcore.experiment.comparison",
    "fedcore.report.page", "fedcore.report.terminal", "matplotlib.backends.backend_svg", "matplotlib.figure",
    "tenseal.sealapi", "tensorboard.summary.writer.event_file_writer",
)  # fmt: skip
REAL = ("fedcore_clients.confine",)
"""Modules that the real interpreter runs: they change namespaces."""

TESTS = str(Path(__file__).parents[1])
_LENGTH = struct.Struct("<I")

CLIENT = """#!{real} -ISS
import _signal, _socket, marshal, os, sys  # the modules above these take twice as long to load as Python
arguments = sys.argv[1:]
found = [each for each in arguments if each in ("-m", "-c")][:1]
place = arguments.index(found[0]) if found else 0
rest = arguments[place + 1 :]
options = set(arguments[:place]) - {{"-P"}}
if not found or options or rest[0] in {never!r}:
    os.execv({real!r}, [{real!r}, *arguments])
link = _socket.socket(_socket.AF_UNIX)
link.connect({sockets!r}[found[0]])
data = marshal.dumps({{
    "how": found[0], "arguments": rest, "cwd": os.getcwd(), "env": dict(os.environ), "python": sys.argv[0],
    "first": [] if "-P" in arguments[:place] else [""],
}})
fds = b"".join(fd.to_bytes(4, sys.byteorder) for fd in (0, 1, 2))
link.sendmsg([len(data).to_bytes(4, "little")], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, fds)])
link.sendall(data)
received = b""
def answer():
    global received
    while b"\\n" not in received:
        more = link.recv(64)
        assert more
        received += more
    line, _, received = received.partition(b"\\n")
    return int(line)
pid = answer()
def forward(number, _):
    try:
        os.kill(pid, number)
    except ProcessLookupError:  # it has ended, and its code is on the way
        pass
for number in (_signal.SIGTERM, _signal.SIGINT, _signal.SIGHUP):
    _signal.signal(number, forward)
code = answer()
if code < 0:
    if code != -_signal.SIGKILL:
        _signal.signal(-code, _signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


# ------------------------------------------------------------------------------ the process that forks


def _receive(link):
    """A request and the three descriptors that come with it; no request where whoever asks is killed meanwhile."""
    data, fds = b"", []
    try:
        data, fds, _, _ = socket.recv_fds(link, _LENGTH.size, 3)
        size = _LENGTH.unpack(data)[0] if len(data) == _LENGTH.size else 0
        parts = bytearray()
        while len(parts) < size and (more := link.recv(size - len(parts))):
            parts += more
    except ConnectionError:
        size, parts = 0, bytearray()
    return marshal.loads(parts) if size and len(parts) == size else None, fds


def serve(path, modules):
    """Fork a process for each request until standard input ends. Returns, in the child only, what it has to run."""
    for name in modules:
        importlib.import_module(name)
    gc.freeze()
    for each in weakref.finalize._registry:  # a process that ends need not free torch's operators
        each.atexit = False
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path + ".new")
    listener.listen(64)
    Path(path + ".new").rename(path)
    poll = select.poll()
    poll.register(0, select.POLLIN)
    poll.register(listener, select.POLLIN)
    children = {}  # descriptor of a process, and of the connection it was asked for on -> both, and its id
    while True:
        fd = poll.poll()[0][0]
        if fd == 0:
            for _, _, pid in children.values():
                os.kill(pid, signal.SIGKILL)
            os._exit(0)
        if fd != listener.fileno():
            process, link, pid = children[fd]
            if fd == link.fileno():  # whoever asked for it has ended, and so does it
                os.kill(pid, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            for each in (process, link.fileno()):
                poll.unregister(each)
                del children[each]
            with contextlib.suppress(OSError):
                link.sendall(f"{code}\n".encode())
            link.close()
            os.close(process)
            continue
        link, _ = listener.accept()
        asked, fds = _receive(link)
        if asked is None:
            for each in (link.detach(), *fds):
                os.close(each)
            continue
        pid = os.fork()
        if not pid:
            for each in {listener.fileno(), link.detach(), *children}:
                os.close(each)
            return asked, fds
        for each in fds:
            os.close(each)
        process = os.pidfd_open(pid)
        children[process] = children[link.fileno()] = process, link, pid
        poll.register(process, select.POLLIN)
        poll.register(link, select.POLLIN)
        with contextlib.suppress(OSError):
            link.sendall(f"{pid}\n".encode())


def become(asked, fds):
    """Turn this forked process into one that was started with what was asked for; runs it."""
    os.setsid()
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
        if fd > 2:
            os.close(fd)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    sys.path.remove(TESTS)
    more = filter(None, asked["env"].get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:0] = [*asked["first"], *more]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        stream = open(number, mode, closefd=False, buffering=1 if number == 2 else -1)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    what, *arguments = asked["arguments"]
    sys.executable = asked["python"]
    sys.argv = ["-c" if asked["how"] == "-c" else what, *arguments]
    code = 0
    try:
        if asked["how"] == "-m":
            sys.modules.pop(what, None)  # it runs under another name
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            exec(what, {"__name__": "__main__"})
    except SystemExit as ended:
        code = ended.code or 0
        if isinstance(code, str):
            sys.stderr.write(code + "\n")
            code = 1
    except BaseException:  # noqa: BLE001 - as the interpreter does
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)  # to free all that was loaded would take half a second


# --------------------------------------------------------------------------------- the side of the tests


class Forked:
    """A forked process, used like a subprocess.Popen."""

    def __init__(self, link, args):
        self.args, self._link, self.returncode = args, link, None
        self._answers = link.makefile()
        self.pid = int(self._answers.readline())

    def _ended(self, seconds):
        """Whether it ends within so many seconds (None: whenever it does)."""
        if self.returncode is None:
            answer = select.poll()  # not select(2): a test may hold thousands of descriptors
            answer.register(self._link, select.POLLIN)
            if answer.poll(None if seconds is None else max(0.0, seconds) * 1000):
                self.returncode = int(self._answers.readline())
                self._link.close()
        return self.returncode is not None

    def poll(self):
        self._ended(0)
        return self.returncode

    def wait(self, timeout=None):
        if not self._ended(timeout):
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)


class Preloaded:
    """The two processes that fork, until this one ends."""

    def __init__(self):
        self.python = sys.executable
        self._processes = []
        if not SUPPORTED:
            return
        folder = Path(tempfile.mkdtemp(prefix="preloaded-"))
        atexit.register(self._close, folder)
        self._sockets = {
            how: str(folder / name) for how, name in (("-c", "libraries"), ("-m", "fedcore"))
        }
        for how, modules in (("-c", LIBRARIES), ("-m", LIBRARIES + FEDCORE)):
            code = f"from support import preloaded as p; p.become(*p.serve({self._sockets[how]!r}, {modules!r}))"
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-P", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                    env=os.environ | {"PYTHONPATH": TESTS}, start_new_session=True,
                )
            )  # fmt: skip
        script = folder / "python"
        script.write_text(CLIENT.format(real=sys.executable, never=REAL, sockets=self._sockets))
        script.chmod(0o755)
        self.python = str(script)
        while not all(Path(each).exists() for each in self._sockets.values()):
            assert all(each.poll() is None for each in self._processes)
            time.sleep(0.02)

    def start(self, arguments, *, env, output):
        """The process of `python ARGUMENTS`, the leader of a session of its own, without an input.

        output: an open file for what it prints and for its errors.
        """
        if not SUPPORTED:
            return subprocess.Popen(
                [self.python, *arguments], env=env, stdout=output, stderr=output, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
        how = next(each for each in arguments if each in {"-m", "-c"})
        rest = arguments[arguments.index(how) + 1 :]
        asked = {
            "how": how,
            "arguments": rest,
            "cwd": str(Path.cwd()),
            "env": dict(env),
            "python": self.python,
            "first": [],
        }
        data = marshal.dumps(asked)
        link = socket.socket(socket.AF_UNIX)
        link.connect(self._sockets[how])
        with Path(os.devnull).open() as empty:
            fds = [each.fileno() for each in (empty, output, output)]
            socket.send_fds(link, [_LENGTH.pack(len(data)), data], fds)
        return Forked(link, arguments)

    def _close(self, folder):
        for each in self._processes:
            each.stdin.close()
            each.wait()
        shutil.rmtree(folder)


@functools.cache
def preloaded():
    """Of this process."""
    return Preloaded()
