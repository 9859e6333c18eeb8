# SPDX-License-Identifier: Apache-2.0
"""``pyvmm serve``: the VMM that a runtime launches and drives over a unix socket, with Firecracker's own options."""

from __future__ import annotations

import errno
import os
import sys
import threading

from vmm import __version__, launched, logger, signals, threads, undertaker
from vmm.api import API_VERSION
from vmm.config import attribute, fill_from_files, parse_count
from vmm.errors import ConfigError, host_errors, host_problem
from vmm.exits import StopReason

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from vmm.api.server import Server
    from vmm.config import Arguments, Table
    from vmm.machine.machine import Machine

# Firecracker's exit codes.
STATUS_OK = 0
STATUS_GENERIC = 1
STATUS_BAD_CONFIGURATION = 152
STATUS_ARGUMENTS = 153
# What lies above says something about us, as 148 does, and is not the guest's word.
MAX_GUEST_STATUS = 127
DEFAULT_SOCKET = "/run/firecracker.socket"
MAX_ID = 64
MAX_PAYLOAD = 51200
_BACKLOG = 128

OPTIONS: Table = (
    ("--api-sock", "PATH", DEFAULT_SOCKET, f"the API's unix socket (default: {DEFAULT_SOCKET})"),
    ("--id", "ID", "anonymous-instance", "the VM's id (default: anonymous-instance)"),
    ("--config-file", "FILE", None, "configuration of a VM to start at once, in JSON"),
    ("--no-api", None, False, "no API; needs --config-file"),
    ("--log-path", "PATH", None, "write messages to this existing file or FIFO"),
    ("--level", "LEVEL", None, "the least important messages to write: Off, Error, Warn, Info, Debug or Trace"),
    ("--module", "MODULE", None, "write only messages of this module"),
    ("--show-level", None, False, "write the level of each message"),
    ("--show-log-origin", None, False, "write the source file and line of each message"),
    ("--metrics-path", "PATH", None, "write metrics to this existing file or FIFO"),
    ("--boot-timer", None, False, "a device by which the guest logs its boot time"),
    ("--start-time-us", "US", None, "when the process was started, by the monotonic clock"),
    ("--start-time-cpu-us", "US", None, "when the process was started, by its CPU clock"),
    ("--parent-cpu-time-us", "US", None, "CPU time of the process that started this one"),
    (
        "--mmds-size-limit",
        "BYTES",
        None,
        "limit of the metadata service's document (default: the limit of a request's body)",
    ),
    ("--metadata", "FILE", None, "document of the metadata service, in JSON"),
    ("--no-seccomp", None, False, "turn the system call filters off"),
    ("--seccomp-filter", "FILE", None, "refused: pyvmm has its own filters"),
    ("--version", None, False, "print the versions of the API and of pyvmm"),
    ("--snapshot-version", None, False, "print the version of the snapshots that it writes"),
    ("--describe-snapshot", "FILE", None, "print the version of a snapshot's state file"),
    ("--http-api-max-payload-size", "BYTES", None, "limit of a request's body (default: 51200)"),
)


def from_files(args: Arguments) -> dict[str, str]:
    """Give `args` what files have for options that are left out; by option where it comes from (``vmm.config.files``).

    :raises ConfigError: a file cannot be read, or says what it may not
    """
    if not (sources := fill_from_files(args, "serve", OPTIONS)):
        return {}
    from vmm.config.files import named

    for option, source in sources.items():
        with named(source):
            if option == "--level":
                logger.parse_level(args.level or "")
            elif option in _LIMITS:
                _number(args, option)
    return sources


def check_id(vmm_id: str) -> None:
    """:raises ConfigError: the id is not 1 to 64 letters, digits and hyphens"""
    if not 0 < len(vmm_id) <= MAX_ID or not all(c.isascii() and (c.isalnum() or c == "-") for c in vmm_id):
        raise ConfigError("--id", vmm_id, f"must be 1 to {MAX_ID} letters, digits and hyphens")


def main(args: Arguments, on_ready: Callable[[], object] = lambda: None, *, files: bool = True) -> int:
    """Serve until the VM ends or a signal asks for the end; Firecracker's exit codes.

    :param on_ready: called once the VM of the configuration file runs, or the API answers
    :param files: whether to read defaults from files; False: `args` has them, and this host's files are not here
    """
    if args.version:
        # A version gate reads the first line; Firecracker's own has an empty one after it.
        print(f"Firecracker v{API_VERSION}\n\npyvmm {__version__}")
        return STATUS_OK
    if args.snapshot_version or args.describe_snapshot is not None:
        return _tell_snapshot_version(args.describe_snapshot)
    try:
        if files:
            from_files(args)
        check_id(args.id)
        if args.no_api and args.config_file is None:
            raise ConfigError("--no-api", "", "needs --config-file: without an API, it says what to run")
        serve = _Serve(args, on_ready)
        if args.seccomp_filter is not None:
            fits = "is for Firecracker's threads; leave it out: pyvmm's have their own"
            raise ConfigError("--seccomp-filter", args.seccomp_filter, fits)
    except ConfigError as error:
        _complain(args, str(error))
        return _leave(STATUS_ARGUMENTS)
    try:
        if args.level is not None:
            logger.parse_level(args.level)
    except ConfigError as error:
        _complain(args, f"--{error}")
        return _leave(STATUS_BAD_CONFIGURATION)
    return _leave(serve.run())


def _complain(args: Arguments, text: str) -> None:
    # Where a person looks, and where a runtime does: of a process without a terminal the log is all that is left.
    print(f"pyvmm serve: {text}", file=sys.stderr)
    if not logger.configured() and args.log_path is not None:
        try:
            logger.configure(log_path=args.log_path, vmm_id=args.id, **{name: getattr(args, name) for name in _SHOW})
        except ConfigError:
            return
    if logger.configured():
        logger.error(text)


def _leave(status: int) -> int:
    if logger.configured():
        if status == STATUS_OK:
            logger.info("Firecracker exiting successfully. exit_code=0")
        else:
            logger.error(f"Firecracker exiting with error. exit_code={status}")
    return status


def _tell_snapshot_version(path: str | None) -> int:
    from vmm.machine.snapshot_file import FORMAT, format_of, read_state

    number = FORMAT
    if path is not None:
        with host_errors("--describe-snapshot", path):
            number = format_of(read_state(path), path)
    print(f"v{number}.0.0")
    return STATUS_OK


_SHOW = ("show_level", "show_log_origin")
_LIMITS = ("--http-api-max-payload-size", "--mmds-size-limit")
_TIMES = ("--start-time-us", "--start-time-cpu-us", "--parent-cpu-time-us")


def _number(args: Arguments, option: str) -> int | None:
    text = getattr(args, attribute(option))
    return None if text is None else parse_count(option, text, 0, (1 << 63) - 1)


class _Serve:
    # :raises ConfigError: an option that is a number is not one
    def __init__(self, args: Arguments, on_ready: Callable[[], object]) -> None:
        self._args = args
        self._times = [_number(args, option) for option in _TIMES]
        payload, document = (_number(args, option) for option in _LIMITS)
        self._payload = MAX_PAYLOAD if payload is None else payload
        self._mmds_limit = self._payload if document is None else document
        self._on_ready = on_ready
        self._ended = self._reads = False
        self._machine: Machine | None = None
        self._signal = 0
        self._broken_pipes = 0
        self._server: Server | None = None

    def run(self) -> int:
        """From the socket to the exit code."""
        with signals.Bell() as self._bell:
            self._heed_signals()
            try:
                if not self._args.no_api:
                    self._server = self._listen()
                return self._run()
            except Exception as error:
                problem = host_problem(error)
                _complain(self._args, problem or f"{type(error).__name__}: {error}")
                if problem is None:
                    raise  # a mistake of ours, which a traceback says best
                return STATUS_GENERIC
            finally:
                self._stop_serving()

    def _stop_serving(self) -> None:
        # Returns once the last request is answered.
        if self._server is not None:
            self._server.close()

    def _listen(self) -> Server:
        # There before anything else is imported: a runtime waits for it.
        from vmm.unix_socket import Listener

        path = self._args.api_sock
        listener = Listener("--api-sock", path, _BACKLOG, fd=launched.take_socket(path))
        launched.spare_httptools()
        from vmm.api.server import Server

        return Server(listener, self._answer, self._payload)

    def _run(self) -> int:
        args = self._args
        self._faults.set_thread_name(os.path.basename(sys.argv[0]) if sys.argv[0] else "pyvmm")
        launched.spare_msgspec()
        from vmm.api.actions import Vmm
        from vmm.api.answer import answer

        self._ask = answer
        self._vmm = Vmm(args.id, on_start=self._on_start, boot_timer=args.boot_timer, mmds_limit=self._mmds_limit)
        try:
            self._observe()
            if self._server is not None:
                logger.info(f'Listening on API socket ("{args.api_sock}").')
            # Before the first request: no start of a VM waits for them.
            self._vmm.prepare()
            launched.spare_collections("vmm.machine.machine")
            import vmm.machine.machine  # noqa: F401

            if not args.no_seccomp:
                from vmm.jail import seccomp

                seccomp.enable()
            if args.config_file is not None:
                self._use("--config-file", args.config_file, self._start_from)
                logger.info("Successfully started microvm that was configured from one single json")
            launched.finish_start()
            if self._server is not None:
                self._server.start(self._on_api_thread)
            self._on_ready()
            threads.enter("vmm")
            self._bell.wait(self._is_over)
            return self._status()
        finally:
            self._stop_serving()  # first: a machine that a request is making is closed, too
            undertaker.leave()
            self._vmm.close()

    def _heed_signals(self) -> None:
        from vmm import _faults

        self._faults = _faults
        _faults.catch_faults(self._bell.fileno())
        logger.watch(_faults.log_to)
        signals.on_end(self._on_signal)
        signals.on(signals.CPU_LIMIT, self._on_signal)
        # If nobody reads any more, write(2) says so; who wants to know that it happened reads the metrics.
        signals.on(signals.BROKEN_PIPE, self._on_broken_pipe)
        signals.on_power(self._press_power_button)

    def _is_over(self) -> bool:
        if self._broken_pipes:
            self._vmm.metrics.count("signals", "sigpipe", self._broken_pipes)
            logger.error("Received signal 13, code 0.")
            self._broken_pipes = 0  # with the next one, where it was the log's own reader that went away
        self._signal = self._signal or self._faults.sent()
        return self._ended or self._signal > 0

    def _observe(self) -> None:
        # The logger and the metrics, as far as the command line says where they go.
        from typing import Any

        from vmm.api import types
        from vmm.api.bodies import decode, encode

        args, handle = self._args, self._vmm.handle
        start, start_cpu, parent = self._times
        self._vmm.metrics.report_start(start, start_cpu, parent or 0)
        names = ("log_path", "level", "module", *_SHOW)
        chosen = {name: value for name in names if (value := getattr(args, name)) not in (None, False)}
        # Names go by JSON, as the API tells them: one that is not UTF-8 is refused here, and not when somebody asks.
        if chosen:
            handle("ConfigureLogger", decode(types.Logger, encode(chosen)))
        logger.info(f"Running Firecracker v{API_VERSION}")
        if args.metrics_path is not None:
            handle("ConfigureMetrics", decode(types.Metrics, encode({"metrics_path": args.metrics_path})))
        if args.metadata is not None:
            self._use("--metadata", args.metadata, lambda text: handle("PutMMDS", decode(Any, text)))

    def _use(self, option: str, path: str, use: Callable[[bytes], object]) -> None:
        # What goes wrong with the file of an option is told with its name.
        from vmm.api import ApiError

        try:
            self._reads = True  # perhaps of a pipe or a terminal, where no end may come
            with open(path, "rb") as file:
                text = file.read()
            self._reads = False
            use(text)
        except (OSError, ApiError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise ApiError(f"{option} {path}: {why}") from error

    def _on_api_thread(self) -> None:
        self._faults.set_thread_name("fc_api")
        logger.info("API server started.")
        if self._machine is not None:
            threads.enter("api")

    def _answer(self, method: str, path: str, body: bytes) -> Any:
        answered = self._ask(self._vmm, method, path, body)
        if self._vmm.lost and self._server is not None:
            self._server.then(self._end)
        return answered

    def _start_from(self, text: bytes) -> None:
        from vmm.api import types
        from vmm.api.bodies import decode

        self._vmm.configure(decode(types.VmConfiguration, text))
        self._vmm.handle("StartMicroVm")

    def _on_start(self, machine: Machine) -> None:
        self._machine = machine
        machine.on_exit(lambda stop: self._end())
        if machine.state == "Stopped":
            self._end()
        if threading.current_thread() is not threading.main_thread():
            threads.enter("api")  # for what comes now, it needs less

    def _on_signal(self, number: int, frame: object) -> None:
        self._signal = number
        self._end()
        if self._reads:
            raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR))  # or Python reads on

    def _on_broken_pipe(self, number: int, frame: object) -> None:
        self._broken_pipes += 1

    def _press_power_button(self) -> None:
        if self._machine is not None:
            self._machine.press_power_button()

    def _end(self) -> None:
        self._ended = True
        self._bell.ring()

    def _status(self) -> int:
        machine = self._machine
        if number := self._signal:
            # In Firecracker's words, and counted where it counts them.
            if logger.configured():
                logger.error(f"Shutting down VM after intercepting signal {number}, code 0.")
            if (field := _SIGNAL_FIELDS.get(number)) is not None:
                self._vmm.metrics.store("signals", field, 1)
            if machine is None:
                self._vmm.metrics.close()
        if self._vmm.lost:
            return STATUS_GENERIC
        if machine is None or self._signal:
            logger.info("Vmm is stopping.")
            return _SIGNAL_STATUS.get(self._signal, STATUS_OK)
        stop = machine.wait()
        assert stop is not None  # wait() without a time limit
        logger.info("Vmm is stopping.")
        if stop.reason is StopReason.GUEST_EXIT:
            return min(stop.status, MAX_GUEST_STATUS)
        if stop.reason in (StopReason.INTERNAL_ERROR, StopReason.FAIL_ENTRY):
            _complain(self._args, f"guest ended: {stop}")
            return STATUS_GENERIC
        return STATUS_OK


# By signal: its field of the metrics, and Firecracker's exit code where the end is not one that was asked for.
_SIGNAL_FIELDS = {1: "sighup", 4: "sigill", 7: "sigbus", 11: "sigsegv", 24: "sigxcpu", 25: "sigxfsz"}
_SIGNAL_STATUS = {4: 157, 7: 149, 11: 150, 24: 154, 25: 151}
